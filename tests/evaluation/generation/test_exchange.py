"""The exchange: orders meet free slots, pieces come back in order, whoever goes away frees what it held."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from luthier.errors import Failure, InvalidArgument, NotFound, ResourceExhausted, Unavailable
from luthier.evaluation.generation.domain import FinishReason, ModelAt, Order, Piece
from luthier.evaluation.generation.exchange import Exchange

ORDER = Order(
    generation_id="g1",
    base_model=ModelAt(name="projects/p/models/m", digest="d"),
    adapter=None,
    turns=(),
    tools_json="",
    prompt="hi",
    max_new_tokens=8,
    temperature=0.0,
    top_p=1.0,
    seed=0,
    token="",
)


def order(number: int) -> Order:
    return replace(ORDER, generation_id=f"g{number}")


async def collect(pieces: AsyncIterator[Piece]) -> list[str]:
    return [piece.text async for piece in pieces]


async def begun(exchange: Exchange, slots: int = 1) -> AsyncIterator[Order | str]:
    """A worker that has announced itself."""
    taken = exchange.take(slots)
    waiting = asyncio.ensure_future(anext(aiter(taken)))
    await asyncio.sleep(0)
    await asyncio.sleep(0)

    async def messages() -> AsyncIterator[Order | str]:
        yield await waiting
        async for message in taken:
            yield message

    return messages()


async def test_pieces_come_back_in_order() -> None:
    exchange = Exchange()
    worker = await begun(exchange)
    answer = asyncio.ensure_future(collect(exchange.generate(ORDER)))
    assert await anext(worker) == ORDER
    for text in ("a", "b"):
        exchange.push(Piece(generation_id="g1", text=text))
    exchange.push(Piece(generation_id="g1", text="c", finish_reason=FinishReason.STOP))
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
    assert await anext(worker) == order(0), "the others are served all the same"
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
    assert isinstance(first, Order)
    assert isinstance(second, Order)
    last = Piece(generation_id=first.generation_id, text="", finish_reason=FinishReason.STOP)
    exchange.push(last)
    assert isinstance(await third, Order)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_caller_that_goes_away_stops_its_generation() -> None:
    exchange = Exchange()
    worker = await begun(exchange)
    pieces = exchange.generate(ORDER)
    reading = asyncio.ensure_future(anext(aiter(pieces)))
    await anext(worker)
    exchange.push(Piece(generation_id="g1", text="a"))
    await reading
    await pieces.aclose()  # type: ignore[attr-defined]
    assert await anext(worker) == "g1", "the worker is told to stop"
    with pytest.raises(NotFound, match="nobody waits for generation 'g1'"):
        exchange.push(Piece(generation_id="g1", text="b"))


async def test_a_worker_that_goes_away_sends_its_callers_away() -> None:
    exchange = Exchange()
    taken = exchange.take(1)
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
    exchange.push(Piece(generation_id="g1", text="", failure=failure))
    with pytest.raises(InvalidArgument, match="too long") as caught:
        await answer
    assert caught.value.reason == "SEQUENCE_TOO_LONG"


async def test_who_waits_for_a_slot_is_told_when_the_last_worker_goes() -> None:
    exchange = Exchange()
    taken = exchange.take(1)
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
    leaving = exchange.take(1)
    first = asyncio.ensure_future(anext(aiter(leaving)))
    await asyncio.sleep(0.01)
    answers = [asyncio.ensure_future(collect(exchange.generate(order(number)))) for number in range(2)]
    assert await first == order(0)
    staying = await begun(exchange)
    assert await anext(staying) == order(1)
    await leaving.aclose()  # type: ignore[attr-defined]
    exchange.push(Piece(generation_id="g1", text="a", finish_reason=FinishReason.STOP))
    assert await answers[1] == ["a"]
    with pytest.raises(Unavailable):
        await answers[0]
