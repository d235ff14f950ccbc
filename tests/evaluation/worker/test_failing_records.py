"""One record that cannot be answered is a row with an error: the others are answered, scored and compared."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.evaluation.peer_servers import thing

from luthier.errors import FailedPrecondition, Reason
from luthier.errors.status import status_to_failure
from luthier.evaluation.worker.references import MAX_FIELDS
from luthier.lm.decoding import Batch
from luthier.text.records import ChatRecord, Message
from luthier.v1 import evaluation_pb2
from luthier.v1.evaluation_pb2 import EvaluationArm
from luthier.v1.evaluation_service_pb2 import CreateEvaluationRequest
from luthier.v1.verdict_pb2 import EvaluationVerdict, Guard, GuardResult, ScoreGuard

SUCCEEDED = evaluation_pb2.Evaluation.STATE_SUCCEEDED
EXACT = evaluation_pb2.EVALUATION_METRIC_EXACT_MATCH
FIELDS = evaluation_pb2.EVALUATION_METRIC_FIELD_MATCH
PERPLEXITY = evaluation_pb2.EVALUATION_METRIC_PERPLEXITY


def chat(question: str, answer: str = '{"colour": "red"}') -> ChatRecord:
    return ChatRecord(
        messages=(Message(role="user", content=question), Message(role="assistant", content=answer))
    )


def result_of(done: evaluation_pb2.Evaluation, arm_id: str) -> evaluation_pb2.ArmResult:
    return next(result for result in done.arm_results if result.arm_id == arm_id)


async def test_a_record_that_is_too_long_fails_alone(site: Any) -> None:
    # With two examples before it the prompt outgrows the context of 1,024 tokens, without them it does not.
    site.data.records["TEST"][4] = chat("colour " * 950)
    arms = [("zero", "base", 0), ("few", "base", 2)]
    async with site.worker():
        made = await site.evaluate(arms=arms, metrics=[EXACT, PERPLEXITY], max_new_tokens=6)
        done = await site.ended(made.name)
    assert done.state == SUCCEEDED, done.error
    assert (done.num_records, result_of(done, "zero").num_errors, result_of(done, "few").num_errors) == (
        12,
        0,
        1,
    )
    (warning,) = (one for one in done.warnings if "cannot tell arms apart" not in one)
    assert warning.startswith(
        "arm few could not answer 1 of 12 records, which count in none of its scores; the first, test.jsonl:5: "
        "prefix, prompt and new tokens must fit the model's context of 1024 tokens, got "
    )
    rows = await site.predictions(made.name)
    failed = [(row.row, answer.arm_id) for row in rows for answer in row.answers if answer.HasField("error")]
    assert failed == [(4, "few")]
    row = rows[4]
    assert (row.filename, row.line) == ("test.jsonl", 5)
    assert status_to_failure(row.answers[1].error).reason == Reason.SEQUENCE_TOO_LONG
    assert (row.answers[1].text, dict(row.answers[1].scores), row.answers[1].finish_reason) == ("", {}, 0)
    assert row.answers[0].finish_reason != evaluation_pb2.FINISH_REASON_UNSPECIFIED
    counts = {
        (result.arm_id, score.score): score.count for result in done.arm_results for score in result.scores
    }
    assert counts == {
        ("zero", "exact_match"): 12,
        ("zero", "perplexity"): 12,
        ("few", "exact_match"): 11,
        ("few", "perplexity"): 11,
    }
    assert {one.score: one.count for one in done.comparisons} == {"exact_match": 11, "perplexity": 11}


def of_prompt_tokens(site: Any) -> CreateEvaluationRequest:
    """Ask for what an example costs: each question has another one, and so other tokens more."""
    arms = [
        EvaluationArm(
            arm_id="few",
            model=f"{site.PARENT}/models/base",
            num_shots=1,
            shot_choice=evaluation_pb2.SHOT_CHOICE_SIMILAR,
        ),
        EvaluationArm(arm_id="tuned", model=f"{site.PARENT}/models/tuned"),
    ]
    request = CreateEvaluationRequest(parent=site.PARENT)
    request.evaluation.CopyFrom(
        evaluation_pb2.Evaluation(
            dataset_version=site.VERSION,
            arms=arms,
            metrics=[evaluation_pb2.EVALUATION_METRIC_PROMPT_TOKENS],
            primary_score="prompt_tokens",
            guards=[Guard(score=ScoreGuard(score="prompt_tokens", max_loss=1))],
            max_new_tokens=2,
        )
    )
    return request


@pytest.mark.parametrize(("num_long", "is_told"), [(1, True), (2, False)])
async def test_an_arm_that_fails_on_records_of_its_own_decides_by_nine_of_ten_at_least(
    site: Any, num_long: int, is_told: bool
) -> None:
    """Of twelve records 11 are enough, with a warning, and 10 are not: those that do not fit behind the example."""
    site.data.records["TRAIN"] = [chat(f"say {n}: {'please ' * n}?") for n in range(12)]
    for row in range(num_long):
        site.data.records["TEST"][3 + row] = chat("colour " * 985)
    async with site.worker():
        made = await site.call("CreateEvaluation", of_prompt_tokens(site))
        done = await site.ended(made.name)
    assert done.state == SUCCEEDED, done.error
    (row,) = done.comparisons
    assert (row.count, row.num_lost_candidate, row.num_lost_baseline, row.num_lost_both) == (
        12 - num_long,
        0,
        num_long,
        0,
    )
    common = (
        f"tuned and few have {12 - num_long} of 12 records in common on prompt_tokens (few alone has no score of "
        f"{num_long})"
    )
    assert any(one.startswith(f"{common}: what they show") for one in done.warnings)
    if is_told:
        assert row.verdict == evaluation_pb2.VERDICT_BETTER
        assert done.verdict.outcome == EvaluationVerdict.OUTCOME_FINE_TUNE_WINS
        assert done.verdict.sentence.endswith("on 11 of 12 records.")
        assert done.verdict.guards[0].standing == GuardResult.STANDING_HELD
        return
    assert row.verdict == evaluation_pb2.VERDICT_INSUFFICIENT_EVIDENCE
    assert done.verdict.outcome == EvaluationVerdict.OUTCOME_INCONCLUSIVE
    assert done.verdict.sentence.startswith(f"Inconclusive: {common}, and 90% must be")
    assert done.verdict.guards[0].standing == GuardResult.STANDING_UNDECIDED


async def test_a_failing_record_changes_nothing_for_the_others(site: Any) -> None:
    async with site.worker():
        whole = await site.ended((await site.evaluate(max_new_tokens=6)).name)
        site.data.records["TEST"].append(chat("colour " * 1100))
        made = await site.evaluate(max_new_tokens=6)
        assert (await site.ended(made.name)).state == SUCCEEDED
    before, after = await site.predictions(whole.name), await site.predictions(made.name)
    assert [row.answers[0].HasField("error") for row in after] == [False] * 12 + [True]
    assert after[:12] == before


async def test_a_record_that_the_template_refuses_fails_alone(site: Any, tmp_path: Path) -> None:
    picky = tmp_path / "picky"
    shutil.copytree(site.models.folders["base"], picky)
    template = (picky / "chat_template.jinja").read_text()
    refusal = "{% if 'thing 3' in messages[-1].content %}{{ raise_exception('not thing 3') }}{% endif %}"
    (picky / "chat_template.jinja").write_text(refusal + template)
    site.models.folders = {**site.models.folders, "picky": picky}
    async with site.worker():
        made = await site.evaluate(arms=[("zero", "picky", 0)], max_new_tokens=4)
        done = await site.ended(made.name)
    assert (done.state, result_of(done, "zero").num_errors) == (SUCCEEDED, 1), done.error
    assert "could not answer 1 of 12 records" in done.warnings[0]
    assert "test.jsonl:4" in done.warnings[0]
    failure = status_to_failure((await site.predictions(made.name))[3].answers[0].error)
    assert (failure.code, failure.reason) == ("INVALID_ARGUMENT", Reason.TEMPLATE_INVALID)
    assert "not thing 3" in failure.message


async def test_an_arm_without_any_answer_fails_and_what_was_said_before_is_kept(site: Any) -> None:
    # Twelve examples of about 50 tokens each leave no room for 500 more.
    site.data.records["TRAIN"] = [thing(number) for number in range(100, 120)]
    arms = [("zero", "base", 0), ("many", "base", 12), ("tuned", "tuned", 0)]
    async with site.worker():
        made = await site.evaluate(arms=arms, max_new_tokens=500)
        done = await site.ended(made.name)
    assert done.state == evaluation_pb2.Evaluation.STATE_FAILED
    assert done.error.message.startswith(
        "arm many could answer none of 12 records; the first, test.jsonl:1: prefix,"
    )
    assert status_to_failure(done.error).reason == Reason.SEQUENCE_TOO_LONG
    assert list(done.arm_results) == []
    rows = await site.predictions(made.name)
    assert [[answer.arm_id for answer in row.answers] for row in rows] == [["zero", "many"]] * 12
    assert all(row.answers[0].text and row.answers[0].scores for row in rows)
    assert all(row.answers[1].HasField("error") for row in rows)


async def test_records_that_make_the_engine_fail_are_found_among_those_they_were_asked_with(
    site: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose = Batch._choose
    asked: dict[str, int] = {}

    def failing(batch: Batch, logits: Any) -> Any:
        width = max(map(len, batch._request.prompts))
        asked[batch._request.request_id] = len(batch._request.prompts)
        if width > 60:
            raise FailedPrecondition("the logits are not numbers", reason=Reason.MODEL_INVALID)
        return choose(batch, logits)

    for row in (2, 3, 9):
        site.data.records["TEST"][row] = chat("what colour " * 30)
    async with site.worker():
        monkeypatch.setattr(Batch, "_choose", failing)
        made = await site.evaluate(max_new_tokens=4)
        done = await site.ended(made.name)
    assert done.state == SUCCEEDED, done.error
    after = await site.predictions(made.name)
    failed = [row.row for row in after if row.answers[0].HasField("error")]
    assert failed == [2, 3, 9]
    assert {status_to_failure(after[row].answers[0].error).reason for row in failed} == {Reason.MODEL_INVALID}
    # Prompts that are read together round as they are put together, and of words that are nearly as likely another may
    # be said then: only its being there is compared.
    assert all(row.answers[0].text and row.answers[0].scores for row in after if row.row not in failed)
    assert list(asked.values()) == [12, 6, 3, 1, 2, 1, 1, 3, 1, 2, 6, 3, 3, 1, 2]


async def test_fields_without_end_leave_an_evaluation_small(site: Any) -> None:
    def many(row: int) -> ChatRecord:
        fields = {
            "colour": "red",
            **{f"field {row} {number}": number for number in range(30)},
            "x" * 500: row,
        }
        return chat(f"thing {row}", json.dumps(fields))

    site.data.records["TEST"] = [many(row) for row in range(12)]
    arms = [("zero", "base", 0), ("tuned", "tuned", 0)]
    async with site.worker():
        made = await site.evaluate(arms=arms, metrics=[FIELDS], max_new_tokens=2)
        done = await site.ended(made.name)
    assert done.state == SUCCEEDED, done.error
    names = [score.score for score in result_of(done, "zero").scores]
    assert len(names) == len(set(names)) == MAX_FIELDS + 3
    assert "field_match.field.colour" in names
    (warning,) = (one for one in done.warnings if "references have" in one and "fields" in one)
    # Of the fixtures' models nobody knows how they were taught, nor on what.
    assert sum("is not known any more" in one for one in done.warnings) >= 1
    assert warning.startswith("the references have 362 fields: the 100 that most records have")
    rows = await site.predictions(made.name)
    assert all(set(answer.scores) <= set(names) for row in rows for answer in row.answers)
