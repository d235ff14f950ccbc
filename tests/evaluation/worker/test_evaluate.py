"""A whole evaluation by a real worker: every arm the same questions, and what an end of any kind leaves behind."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from google.rpc import code_pb2

from luthier.errors import Reason
from luthier.errors.status import status_to_failure
from luthier.evaluation.worker import evaluate
from luthier.grading.metrics.exact_match import exact_match
from luthier.lm.engine import Engine
from luthier.lm.load import load_model
from luthier.lm.scoring import sequence_logprobs
from luthier.text.records import ChatRecord, Message
from luthier.text.rendering import Renderer
from luthier.text.tokenizer import TokenizerBundle
from luthier.v1 import evaluation_pb2, evaluation_service_pb2
from luthier.work import worker as worker_module
from luthier.work.limits import Limits
from luthier.work.running import RunnerStuck
from luthier.work.tasks import TaskKind

EXACT = evaluation_pb2.EVALUATION_METRIC_EXACT_MATCH
FIELDS = evaluation_pb2.EVALUATION_METRIC_FIELD_MATCH
PERPLEXITY = evaluation_pb2.EVALUATION_METRIC_PERPLEXITY
ARMS = [("zero", "base", 0), ("few", "base", 2), ("tuned", "tuned", 0)]


async def test_every_arm_answers_the_same_questions(site: Any, model_folders: dict[str, Path]) -> None:
    async with site.worker():
        made = await site.evaluate(arms=ARMS, metrics=[EXACT, FIELDS, PERPLEXITY], max_new_tokens=12)
        done = await site.ended(made.name)
    assert done.state == evaluation_pb2.Evaluation.STATE_SUCCEEDED
    rows = await site.predictions(made.name)
    assert [row.row for row in rows] == list(range(12)) == list(range(done.num_records))
    assert [row.prompt[0].content for row in rows] == [f"what colour has thing {n}?" for n in range(12)]
    said = {
        arm: [answer.text for row in rows for answer in row.answers if answer.arm_id == arm]
        for arm, _, _ in ARMS
    }
    assert len({tuple(texts) for texts in said.values()}) == 3, "examples and adapter change what is said"

    results = {result.arm_id: result for result in done.arm_results}
    assert list(results) == ["zero", "few", "tuned"]
    assert (
        results["tuned"].num_prompt_tokens
        == results["zero"].num_prompt_tokens
        != results["few"].num_prompt_tokens
    )
    for arm, texts in said.items():
        scores = {score.score: score for score in results[arm].scores}
        right = sum(exact_match(text, row.reference) for text, row in zip(texts, rows, strict=True))
        assert scores["exact_match"].value == right / 12
        assert {"field_match.record", "field_match.parsed", "field_match.field.colour"} < scores.keys()
    measured = next(one.value for one in results["zero"].scores if one.score == "perplexity")
    assert measured == pytest.approx(perplexity_of(site, model_folders["base"]), rel=0.02)

    pairs = [
        (one.candidate_arm_id, one.baseline_arm_id) for one in done.comparisons if one.score == "perplexity"
    ]
    assert pairs == [("few", "zero"), ("tuned", "zero"), ("tuned", "few")]
    assert all(one.count == 12 and one.lower <= one.difference <= one.upper for one in done.comparisons)


def perplexity_of(site: Any, folder: Path) -> float:
    """Perplexity of the references, without batches, turns, engine or service."""
    model, renderer = load_model(folder), Renderer(TokenizerBundle.load(folder), today=date.today())
    nll = num_tokens = 0.0
    for record in site.data.records["TEST"]:
        answer = renderer.answer(record)
        (score,) = sequence_logprobs(model, [answer.input_ids], [answer.loss_mask])
        nll, num_tokens = nll - score.logprob, num_tokens + score.num_tokens
    return math.exp(nll / num_tokens)


async def test_the_same_evaluation_gives_the_same_answers_and_scores(site: Any) -> None:
    wanted = {"arms": ARMS, "metrics": [FIELDS, PERPLEXITY], "max_new_tokens": 6, "max_records": 5, "seed": 3}
    async with site.worker():
        first, second = [await site.ended((await site.evaluate(**wanted)).name) for _ in range(2)]
    assert await site.predictions(first.name) == await site.predictions(second.name)
    assert first.comparisons == second.comparisons
    assert first.num_records == 5


async def test_a_reference_that_is_no_json_fails_before_any_model_is_fetched(site: Any) -> None:
    plain = ChatRecord(messages=(Message(role="user", content="q"), Message(role="assistant", content="red")))
    site.data.records["TEST"].append(plain)
    async with site.worker():
        done = await site.ended((await site.evaluate(metrics=[FIELDS])).name)
    assert done.state == evaluation_pb2.Evaluation.STATE_FAILED
    assert done.error.message == "test.jsonl:13: the reference must be a JSON object with a field, got 'red'"
    assert site.models.downloads == 0


async def test_more_examples_than_the_train_split_has_fail(site: Any) -> None:
    async with site.worker():
        done = await site.ended((await site.evaluate(arms=[("few", "base", 9)])).name)
    assert done.error.message == "an arm wants 9 examples, the train split has 8 records"


@pytest.mark.parametrize("changed", ["version", "base", "tuned"])
async def test_what_is_asked_of_must_be_what_was_pinned(
    site: Any, model_folders: dict[str, Path], changed: str
) -> None:
    made = await site.evaluate(arms=[("tuned", "tuned", 0)], max_new_tokens=4)
    if changed == "version":
        site.data.digest = "e" * 64
    else:
        other = model_folders["other" if changed == "base" else "tuned-more"]
        site.models.folders = {**site.models.folders, changed: other}
    async with site.worker():
        done = await site.ended(made.name)
    assert done.state == evaluation_pb2.Evaluation.STATE_FAILED
    request = evaluation_service_pb2.WatchEvaluationRequest(name=made.name)
    attempts = {event.attempt async for event in site.stream("WatchEvaluation", request)}
    assert max(attempts) == 1, "nothing is better the next time"
    failure = status_to_failure(done.error)
    assert (done.error.code, failure.reason) == (code_pb2.DATA_LOSS, Reason.CHECKSUM_MISMATCH)
    assert failure.metadata["name"] == (
        site.VERSION if changed == "version" else f"{site.PARENT}/models/{changed}"
    )
    assert "was deleted and its name used again" in done.error.message


async def test_a_prompt_that_does_not_fit_fails_with_the_limit(site: Any) -> None:
    async with site.worker():
        done = await site.ended((await site.evaluate(max_new_tokens=1020)).name)
    assert done.state == evaluation_pb2.Evaluation.STATE_FAILED
    assert done.error.message.startswith(
        "arm zero could answer none of 12 records; the first, test.jsonl:1: "
        "prefix, prompt and new tokens must fit the model's context of 1024 tokens, got "
    )
    assert status_to_failure(done.error).reason == Reason.SEQUENCE_TOO_LONG


async def test_a_running_evaluation_stops_soon_after_it_is_cancelled(site: Any) -> None:
    async with site.worker():
        made = await site.evaluate(
            arms=[(f"arm-{number}", "base", 0) for number in range(16)], max_new_tokens=900
        )
        await site.until_running(made.name)
        began = time.monotonic()
        await site.call("CancelEvaluation", evaluation_service_pb2.CancelEvaluationRequest(name=made.name))
        done = await site.ended(made.name)
    assert done.state == evaluation_pb2.Evaluation.STATE_CANCELLED
    assert time.monotonic() - began < 10
    assert list((site.home / "laid-out").iterdir()) == []


async def test_a_worker_that_goes_gives_its_evaluation_to_the_next(site: Any) -> None:
    wanted = [(f"arm-{number}", "base", 0) for number in range(2)]
    async with site.worker():
        made = await site.evaluate(arms=wanted, max_new_tokens=200)
        await site.until_running(made.name)
    assert (await site.get(made.name)).state == evaluation_pb2.Evaluation.STATE_QUEUED
    async with site.worker():
        done = await site.ended(made.name)
    assert done.state == evaluation_pb2.Evaluation.STATE_SUCCEEDED


async def test_an_interactive_answer_comes_while_references_and_answers_are_measured(site: Any) -> None:
    async with site.worker():
        made = await site.evaluate(
            arms=[(f"arm-{number}", "base", 0) for number in range(16)],
            metrics=[PERPLEXITY],
            max_new_tokens=900,
        )
        await site.until_running(made.name)
        async with asyncio.timeout(20):
            await site.said("base", "what colour", max_new_tokens=4)
            await site.said("tuned", "what colour", max_new_tokens=4)
        assert (await site.get(made.name)).state == evaluation_pb2.Evaluation.STATE_RUNNING


async def until_not_running(site: Any, name: str) -> None:
    async with asyncio.timeout(30):
        while (await site.get(name)).state == evaluation_pb2.Evaluation.STATE_RUNNING:  # noqa: ASYNC110 - a worker ends it
            await asyncio.sleep(0.1)


async def test_an_engine_that_stands_still_is_noticed_though_its_runner_asks_on(
    site: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stands, go_on, step = threading.Event(), threading.Event(), Engine.step

    def hang(engine: Engine) -> Any:
        stands.set()
        go_on.wait(60)
        return step(engine)

    monkeypatch.setattr(Engine, "step", hang)
    short = {TaskKind.EVALUATE: Limits(stall_seconds=2.0)}
    monkeypatch.setattr(worker_module, "LIMITS", short)
    with pytest.raises(RunnerStuck):  # noqa: PT012 - it shows when the worker ends
        async with site.worker():
            made = await site.evaluate()
            # No arm tells of an answer before the engine has made a step.
            assert await asyncio.to_thread(stands.wait, 30)
            assert (await site.get(made.name)).state == evaluation_pb2.Evaluation.STATE_RUNNING
            await until_not_running(site, made.name)
            assert (await site.get(made.name)).state == evaluation_pb2.Evaluation.STATE_QUEUED
            assert not go_on.is_set()
            go_on.set()


async def test_an_evaluation_may_take_what_its_records_arms_and_tokens_permit(
    site: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    announced: list[tuple[int, int]] = []

    def no_time(num_answers: int, max_new_tokens: int) -> float:
        announced.append((num_answers, max_new_tokens))
        return -1e9

    monkeypatch.setattr(evaluate, "answering_seconds", no_time)
    async with site.worker():
        made = await site.evaluate(arms=ARMS, max_records=5, max_new_tokens=7)
        done = await site.ended(made.name)
    assert announced == [(15, 7)]
    assert done.state == evaluation_pb2.Evaluation.STATE_FAILED
    assert status_to_failure(done.error).reason == Reason.TASK_DEADLINE
