"""The exchange: orders meet free slots, pieces come back in order, whoever goes away frees what it held."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from luthier.errors import Failure, InvalidArgument, NotFound, ResourceExhausted, Unavailable
from luthier.evaluation.generation.exchange import Exchange, Piece
from luthier.v1.evaluation_pb2 import FINISH_REASON_STOP
from luthier.work.convert import failure_to_status
from luthier.worker.v1.task_pb2 import ModelReference
from luthier.worker.v1.worker_service_pb2 import GenerationOrder, TakeGenerationsResponse


def order(number: int) -> GenerationOrder:
    return GenerationOrder(
        generation=f"g{number}",
        base_model=ModelReference(name="projects/p/models/m", digest="d"),
        prompt="hi",
        max_new_tokens=8,
        top_p=1.0,
    )


ORDER = order(1)


def handed_out(wanted: GenerationOrder) -> TakeGenerationsResponse:
    return TakeGenerationsResponse(order=wanted)


async def collect(pieces: AsyncIterator[Piece]) -> list[str]:
    return [piece.text async for piece in pieces]


async def begun(exchange: Exchange, slots: int = 1) -> AsyncIterator[TakeGenerationsResponse]:
    """A worker that has announced itself."""
    taken = exchange.take("w", slots)
    waiting = asyncio.ensure_future(anext(aiter(taken)))
    await asyncio.sleep(0)
    await asyncio.sleep(0)

    async def messages() -> AsyncIterator[TakeGenerationsResponse]:
        yield await waiting
        async for message in taken:
            yield message

    return messages()


async def test_pieces_come_back_in_order() -> None:
    exchange = Exchange()
    worker = await begun(exchange)
    answer = asyncio.ensure_future(collect(exchange.generate(ORDER)))
    assert await anext(worker) == handed_out(ORDER)
    for text in ("a", "b"):
        await exchange.push(Piece(generation="g1", text=text))
    await exchange.push(Piece(generation="g1", text="c", finish_reason=FINISH_REASON_STOP))
    assert await answer == ["a", "b", "c"]


async def test_an_order_without_a_worker_is_unavailable() -> None:
    with pytest.raises(Unavailable, match="no evaluation worker") as caught:
        await collect(Exchange().generate(ORDER))
    assert (caught.value.reason, caught.value.retry_after_seconds) == ("NO_WORKER", 1.0)


async def test_too_many_waiting_orders_are_refused() -> None:
    exchange = Exchange(max_waiting=2)
    worker = await begun(exchange)
    tasks = [asyncio.ensure_future(collect(exchange.generate(order(number)))) for number in range(3)]
    await asyncio.sleep(0.01)
    with pytest.raises(ResourceExhausted, match="2 generations wait"):
        await collect(exchange.generate(order(9)))
    assert await anext(worker) == handed_out(order(0)), "the others are served all the same"
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_worker_gets_no_more_than_its_slots() -> None:
    exchange = Exchange()
    worker = await begun(exchange, slots=2)
    tasks = [asyncio.ensure_future(collect(exchange.generate(order(number)))) for number in range(3)]
    first, second = await anext(worker), await anext(worker)
    third = asyncio.ensure_future(anext(worker))
    await asyncio.sleep(0.02)
    assert not third.done()
    assert [one.WhichOneof("message") for one in (first, second)] == ["order", "order"]
    last = Piece(generation=first.order.generation, finish_reason=FINISH_REASON_STOP)
    await exchange.push(last)
    assert (await third).WhichOneof("message") == "order"
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_caller_that_goes_away_stops_its_generation() -> None:
    exchange = Exchange()
    worker = await begun(exchange)
    pieces = exchange.generate(ORDER)
    reading = asyncio.ensure_future(anext(aiter(pieces)))
    await anext(worker)
    await exchange.push(Piece(generation="g1", text="a"))
    await reading
    await pieces.aclose()  # type: ignore[attr-defined]
    stop = TakeGenerationsResponse(cancel_generation="g1")
    assert await anext(worker) == stop, "the worker is told to stop"
    with pytest.raises(NotFound, match="nobody waits for generation 'g1'"):
        await exchange.push(Piece(generation="g1", text="b"))


async def test_a_worker_that_goes_away_sends_its_callers_away() -> None:
    exchange = Exchange()
    taken = exchange.take("w", 1)
    first = asyncio.ensure_future(anext(aiter(taken)))
    await asyncio.sleep(0.01)
    answer = asyncio.ensure_future(collect(exchange.generate(ORDER)))
    await first
    await taken.aclose()  # type: ignore[attr-defined]
    with pytest.raises(Unavailable, match="the worker went away"):
        await answer


async def test_a_failure_reaches_the_caller_as_its_error() -> None:
    exchange = Exchange()
    worker = await begun(exchange)
    answer = asyncio.ensure_future(collect(exchange.generate(ORDER)))
    await anext(worker)
    failure = Failure(code="INVALID_ARGUMENT", reason="SEQUENCE_TOO_LONG", message="too long")
    await exchange.push(Piece(generation="g1", error=failure_to_status(failure)))
    with pytest.raises(InvalidArgument, match="too long") as caught:
        await answer
    assert caught.value.reason == "SEQUENCE_TOO_LONG"


async def test_who_waits_for_a_slot_is_told_when_the_last_worker_goes() -> None:
    exchange = Exchange()
    taken = exchange.take("w", 1)
    first = asyncio.ensure_future(anext(aiter(taken)))
    await asyncio.sleep(0.01)
    answers = [asyncio.ensure_future(collect(exchange.generate(order(number)))) for number in range(3)]
    await first
    await taken.aclose()  # type: ignore[attr-defined]
    for answer in answers:
        with pytest.raises(Unavailable, match="the worker went away"):
            await asyncio.wait_for(answer, 1)


async def test_who_waits_for_a_slot_gets_one_of_the_workers_that_stay() -> None:
    exchange = Exchange()
    leaving = exchange.take("w", 1)
    first = asyncio.ensure_future(anext(aiter(leaving)))
    await asyncio.sleep(0.01)
    answers = [asyncio.ensure_future(collect(exchange.generate(order(number)))) for number in range(2)]
    assert await first == handed_out(order(0))
    staying = await begun(exchange)
    assert await anext(staying) == handed_out(order(1))
    await leaving.aclose()  # type: ignore[attr-defined]
    await exchange.push(Piece(generation="g1", text="a", finish_reason=FINISH_REASON_STOP))
    assert await answers[1] == ["a"]
    with pytest.raises(Unavailable):
        await answers[0]
