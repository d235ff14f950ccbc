"""Records that tuned models learnt from: counted, listed, scored apart, and left out of comparisons."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import pytest
from tests.stores import service_database

from luthier.evaluation.evaluations.repository import evaluations
from luthier.evaluation.worker.contamination import TrainingRecords
from luthier.text.records import ChatRecord, Message
from luthier.v1 import evaluation_pb2
from luthier.v1.evaluation_service_pb2 import CancelEvaluationRequest
from luthier.work.context import TaskContext
from luthier.worker.v1.task_pb2 import TrainingVersion

ARMS = [("zero", "base", 0), ("tuned", "tuned", 0)]


async def learnt_by_the_tuned_arm(site: Any, name: str, *, digest: str = "d" * 64) -> None:
    """Let the service know that the tuned model learnt from the version that is asked."""
    database = service_database(site.home, "evaluation")
    async with database.transaction() as connection:
        stored = await evaluations().get(connection, name)
        private = stored.copy_private()
        private.training_versions.append(TrainingVersion(name=site.VERSION, digest=digest))
        del private.unknown_models[:]
        await evaluations().update(connection, stored, stored.copy(), private)
    await database.close()


def loud(record: ChatRecord) -> ChatRecord:
    """The same words in another form."""
    question, answer = record.messages
    return ChatRecord(messages=(Message(role="user", content=question.content.upper()), answer))


async def test_what_was_learnt_from_is_counted_listed_scored_apart_and_not_compared(site: Any) -> None:
    test = site.data.records["TEST"]
    site.data.records["TRAIN"] += [test[2], loud(test[5])]
    made = await site.evaluate(arms=ARMS, max_new_tokens=4)
    await learnt_by_the_tuned_arm(site, made.name)
    async with site.worker():
        done = await site.ended(made.name)
    assert done.state == evaluation_pb2.Evaluation.STATE_SUCCEEDED, done.error
    found = done.contamination
    assert list(found.versions) == [site.VERSION]
    assert found.num_training_records == 10
    assert (found.num_exact, found.num_normalised, found.num_ngram) == (1, 1, 0)
    listed = [(one.row, one.kind, one.filename, one.line) for one in found.records]
    assert listed == [
        (2, evaluation_pb2.CONTAMINATION_KIND_EXACT, "train.jsonl", 9),
        (5, evaluation_pb2.CONTAMINATION_KIND_NORMALISED, "train.jsonl", 10),
    ]
    assert {one.arm_id: one.scores[0].count for one in found.clean} == {"zero": 10, "tuned": 10}
    assert {one.arm_id: one.scores[0].count for one in found.contaminated} == {"zero": 2, "tuned": 2}
    assert all(one.scores[0].whole_answer for one in (*found.clean, *found.contaminated))
    assert [result.scores[0].count for result in done.arm_results] == [12, 12]
    assert {one.count for one in done.comparisons} == {10}
    (warning,) = [one for one in done.warnings if "learnt from" in one]
    assert "2 of 12 records stand in what the tuned models learnt from (1 exactly, 1 but for" in warning
    assert "train.jsonl:9" in warning


async def test_without_such_records_nothing_is_scored_apart(site: Any) -> None:
    made = await site.evaluate(arms=ARMS, max_new_tokens=4)
    await learnt_by_the_tuned_arm(site, made.name)
    async with site.worker():
        done = await site.ended(made.name)
    assert done.contamination.num_training_records == 8
    assert not done.contamination.records
    assert not done.contamination.clean
    assert {one.count for one in done.comparisons} == {12}


async def test_an_evaluation_on_what_was_learnt_has_no_comparison_and_says_so(site: Any) -> None:
    site.data.records["TRAIN"] = list(site.data.records["TEST"])
    made = await site.evaluate(arms=ARMS, max_new_tokens=4)
    await learnt_by_the_tuned_arm(site, made.name)
    async with site.worker():
        done = await site.ended(made.name)
    assert done.contamination.num_exact == 12
    assert not done.comparisons
    assert "have no record with exact_match in common" in done.verdict.sentence


async def test_a_training_version_that_is_another_one_by_now_fails_the_evaluation_by_name(site: Any) -> None:
    made = await site.evaluate(arms=ARMS, max_new_tokens=4)
    await learnt_by_the_tuned_arm(site, made.name, digest="e" * 64)
    async with site.worker():
        done = await site.ended(made.name)
    assert done.state == evaluation_pb2.Evaluation.STATE_FAILED
    assert f"{site.VERSION} must have digest {'e' * 64}" in done.error.message
    said = {answer.arm_id: answer.text for answer in (await site.predictions(done.name))[0].answers}
    assert said.keys() == {"zero", "tuned"}, "what was answered is kept"


async def test_a_cancel_while_training_records_are_read_keeps_the_answers(
    site: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_reading = threading.Event()

    def without_end(_records: TrainingRecords, context: TaskContext, *_questions: Any) -> None:
        is_reading.set()
        while True:
            context.check()
            time.sleep(0.05)

    monkeypatch.setattr(TrainingRecords, "look_up", without_end)
    made = await site.evaluate(arms=ARMS, max_new_tokens=4)
    async with site.worker():
        assert await asyncio.to_thread(is_reading.wait, 60)
        await site.call("CancelEvaluation", CancelEvaluationRequest(name=made.name))
        done = await site.ended(made.name)
    assert done.state == evaluation_pb2.Evaluation.STATE_CANCELLED
    assert done.num_records == 12
    assert all(len(one.answers) == 2 for one in await site.predictions(done.name))


async def test_a_model_of_which_nobody_knows_what_it_learnt_from_is_named(site: Any) -> None:
    async with site.worker():
        made = await site.evaluate(arms=ARMS, max_new_tokens=4)
        done = await site.ended(made.name)
    assert list(done.contamination.unknown_models) == [f"{site.PARENT}/models/tuned"]
    assert any("learnt from is not known any more" in warning for warning in done.warnings)


async def test_prompting_alone_has_learnt_nothing(site: Any) -> None:
    async with site.worker():
        made = await site.evaluate(arms=[("zero", "base", 0), ("few", "base", 2)], max_new_tokens=4)
        done = await site.ended(made.name)
    assert not done.HasField("contamination")
    assert done.verdict.outcome == 0
    assert "there is no tuned arm" in done.verdict.sentence
