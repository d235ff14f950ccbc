"""What /metrics says of answers: how long until they begin, how fast they come, how they end."""

from __future__ import annotations

import asyncio

import pytest
from prometheus_client import CollectorRegistry
from tests.evaluation.generation.test_exchange import ORDER, begun, collect, order

from luthier.errors import Failure, LuthierError
from luthier.errors.status import failure_to_status
from luthier.evaluation.generation.exchange import Exchange, Piece
from luthier.evaluation.generation.metrics import GenerationMetrics
from luthier.runtime.metric import OTHER
from luthier.v1.evaluation_pb2 import FINISH_REASON_LENGTH, FINISH_REASON_STOP


class Board:
    def __init__(self) -> None:
        self.now = 10.0
        self.registry = CollectorRegistry()
        self.metrics = GenerationMetrics(self.registry, lambda: self.now)

    def value(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(f"luthier_generation{name}", labels) or 0.0

    def ended(self) -> dict[str, float]:
        return {
            sample.labels["finish_reason"]: sample.value
            for family in self.registry.collect()
            for sample in family.samples
            if sample.name == "luthier_generations_total" and sample.value
        }


def piece(tokens: int, **more: object) -> Piece:
    return Piece(generation="g1", text="a", num_generated_tokens=tokens, **more)  # type: ignore[arg-type]


def test_times_and_tokens_of_an_answer() -> None:
    board = Board()
    answer = board.metrics.begun()
    board.now += 0.5
    answer.take(piece(2))
    board.now += 3.0
    answer.take(piece(12))
    answer.take(piece(12, num_prompt_tokens=7, finish_reason=FINISH_REASON_LENGTH))
    answer.end()
    assert board.value("_first_token_seconds_sum") == 0.5
    assert board.value("_token_seconds_sum") == pytest.approx(0.3)
    assert board.value("_answer_tokens_total") == 12.0
    assert board.value("_prompt_tokens_total") == 7.0
    assert board.ended() == {"LENGTH": 1.0}


def test_an_answer_that_is_left_fails_or_has_one_token() -> None:
    board = Board()
    left = board.metrics.begun()
    left.take(piece(1))
    left.end()
    failed = board.metrics.begun()
    for number in range(50):
        failure = Failure(
            code="UNAVAILABLE", reason="NO_WORKER" if not number else f"MADE_UP_{number}", message="m"
        )
        failed = board.metrics.begun()
        failed.take(Piece(generation="g1", error=failure_to_status(failure)))
        failed.end()
    short = board.metrics.begun()
    short.take(piece(1, finish_reason=FINISH_REASON_STOP))
    short.end()
    assert board.ended() == {"GONE": 1.0, "NO_WORKER": 1.0, OTHER: 49.0, "STOP": 1.0}
    assert board.value("_token_seconds_count") == 0.0


async def test_who_waits_and_who_is_answered() -> None:
    board = Board()
    exchange = Exchange(metrics=board.metrics)
    worker = await begun(exchange, slots=1)
    calls = [asyncio.ensure_future(collect(exchange.generate(order(number)))) for number in (1, 2)]
    await anext(worker)
    assert (board.value("s_running"), board.value("s_waiting")) == (1.0, 1.0)
    await exchange.push(piece(1, finish_reason=FINISH_REASON_STOP))
    await calls[0]
    await anext(worker)
    assert (board.value("s_running"), board.value("s_waiting")) == (1.0, 0.0)
    calls[1].cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    assert board.value("s_running") == 0.0
    assert board.ended() == {"STOP": 1.0, "GONE": 1.0}


async def test_a_call_that_no_worker_can_take_is_none() -> None:
    board = Board()
    with pytest.raises(LuthierError):
        await collect(Exchange(metrics=board.metrics).generate(ORDER))
    assert board.ended() == {}
