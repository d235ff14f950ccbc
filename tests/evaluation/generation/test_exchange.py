"""The exchange: orders meet free slots, pieces come back in order, whoever goes away frees what it held."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from luthier.errors import Failure, InvalidArgument, NotFound, ResourceExhausted, Unavailable
from luthier.errors.status import failure_to_status
from luthier.evaluation.generation.exchange import Exchange, Piece
from luthier.v1.evaluation_pb2 import FINISH_REASON_STOP
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
    orders = [asking(number, f"m{number}") for number in range(3)]
    tasks = [asyncio.ensure_future(collect(exchange.generate(one))) for one in orders]
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
    await pieces.aclose()
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
    await taken.aclose()
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
    await taken.aclose()
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
    await leaving.aclose()
    await exchange.push(Piece(generation="g1", text="a", finish_reason=FINISH_REASON_STOP))
    assert await answers[1] == ["a"]
    with pytest.raises(Unavailable):
        await answers[0]


def asking(number: int, model: str, project: str = "p", adapter: str = "") -> GenerationOrder:
    wanted = order(number)
    wanted.base_model.name = f"projects/{project}/models/{model}"
    if adapter:
        wanted.adapter.CopyFrom(ModelReference(name=f"projects/{project}/models/{adapter}", digest="a"))
    return wanted


@asynccontextmanager
async def working(exchange: Exchange, slots: int) -> AsyncIterator[list[str]]:
    """A worker for the length of a block; yields the ids of the orders that it has got so far."""
    got: list[str] = []

    async def take() -> None:
        async for message in exchange.take("w", slots):
            if message.WhichOneof("message") == "order":
                got.append(message.order.generation)

    taking = asyncio.create_task(take())
    await asyncio.sleep(0)
    yield got
    taking.cancel()
    await asyncio.gather(taking, return_exceptions=True)


@asynccontextmanager
async def placed(exchange: Exchange, *orders: GenerationOrder) -> AsyncIterator[None]:
    """Callers who wait for the answers to orders, for the length of a block."""
    calls = [asyncio.create_task(collect(exchange.generate(one))) for one in orders]
    await asyncio.sleep(0.02)
    yield
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)


async def test_a_model_whose_prompts_hang_takes_no_last_slot() -> None:
    exchange = Exchange()
    hanging = [asking(number, "base", adapter="hangs") for number in range(6)]
    async with working(exchange, slots=4) as got, placed(exchange, *hanging):
        assert got == ["g0", "g1", "g2"]
        async with placed(exchange, asking(7, "base", adapter="good")):
            assert got == ["g0", "g1", "g2", "g7"]


async def test_a_model_that_answers_takes_every_slot() -> None:
    exchange = Exchange()
    async with working(exchange, slots=4) as got, placed(exchange, *map(order, range(6))):
        assert got == ["g0", "g1", "g2"]
        await exchange.push(Piece(generation="g1", text="a"))
        await asyncio.sleep(0.02)
        assert got == ["g0", "g1", "g2", "g3"]
        await exchange.push(Piece(generation="g0", text="a", finish_reason=FINISH_REASON_STOP))
        await asyncio.sleep(0.02)
        assert got == ["g0", "g1", "g2", "g3", "g4"]


async def test_the_project_with_the_fewest_orders_comes_first() -> None:
    exchange = Exchange()
    many = [asking(number, f"m{number}", "many") for number in range(4)]
    async with working(exchange, slots=2) as got, placed(exchange, *many, asking(9, "m", "one")):
        assert got == ["g0", "g1"], "nobody else had asked yet"
        await exchange.push(Piece(generation="g0", text="", finish_reason=FINISH_REASON_STOP))
        await asyncio.sleep(0.02)
        assert got == ["g0", "g1", "g9"]
