"""Evaluations with graders: scores as jobs and GradeSamples give them, errors that are no scores, workers that stop."""

from __future__ import annotations

import json
import statistics
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from tests.evaluation.conftest import Site
from tests.evaluation.peer_servers import thing
from tests.evaluation.worker.test_resume import until_answered
from tests.work.reward_services import rewarding

from luthier.errors.status import status_to_failure
from luthier.evaluation import shares
from luthier.evaluation.worker import graders as graders_module
from luthier.grading.outcomes import GradingError
from luthier.lm.generate import FinishReason
from luthier.text.records import CompletionRecord, record_to_json
from luthier.training.recipes.rollouts import Rollout
from luthier.training.worker.rollouts import JobRollouts, Records
from luthier.v1 import evaluation_pb2 as api
from luthier.v1.evaluation_pb2 import Evaluation, Prediction
from luthier.v1.evaluation_service_pb2 import GradeSamplesRequest
from luthier.v1.grader_pb2 import (
    Grader,
    JsonMatchGrader,
    MultiGrader,
    NumberMatchGrader,
    RegexGrader,
    RemoteGrader,
    Sample,
    SampleGrade,
    ScoreRange,
    StringCheckGrader,
    TextSimilarityGrader,
)
from luthier.v1.reward_service_pb2 import SampleScore, ScoreRequest, ScoreResponse
from luthier.v1.verdict_pb2 import Guard, ScoreGuard
from luthier.work.rewards import RewardAddresses, RewardError, scored
from luthier.worker.v1 import task_pb2

RECORDS = 12
ARMS = [("zero", "base", 0), ("few", "base", 1), ("tuned", "tuned", 0)]
ANSWER, REFERENCE = "{{sample.output_text}}", "{{item.messages[-1].content}}"
ALIKE = Grader(
    name="alike",
    text_similarity=TextSimilarityGrader(
        input=ANSWER, reference=REFERENCE, evaluation_metric=TextSimilarityGrader.SIMILARITY_FUZZY_MATCH
    ),
)
VOWEL = Grader(name="vowel", regex=RegexGrader(input=ANSWER, pattern="[aeiou]"))
SAME = Grader(
    name="same",
    string_check=StringCheckGrader(
        input=ANSWER, reference=REFERENCE, operation=StringCheckGrader.OPERATION_EQ
    ),
)
FIELDS = Grader(name="fields", json_match=JsonMatchGrader(input=ANSWER, reference=REFERENCE))
NUMBER = Grader(name="number", number_match=NumberMatchGrader(input=ANSWER, reference=REFERENCE))
MIXED = Grader(
    name="mixed",
    multi=MultiGrader(
        graders={"alike": ALIKE, "vowel": VOWEL},
        calculate_output="2 * alike - vowel",
        range=ScoreRange(min=-1, max=2),
    ),
)


def far(address: str, name: str = "far", **fields: Any) -> Grader:
    return Grader(name=name, remote=RemoteGrader(address=address, timeout_seconds=30, **fields))


def by_length(request: ScoreRequest, context: Any) -> ScoreResponse:
    """A score of answers of even length, an error of others."""
    return ScoreResponse(
        scores=[
            SampleScore(score=min(len(one.output_text), 50) / 50)
            if len(one.output_text) % 2 == 0
            else SampleScore(error=f"{len(one.output_text)} is odd")
            for one in request.samples
        ]
    )


async def run(site: Site, *graders: Grader, **fields: Any) -> Evaluation:
    wanted = {"arms": ARMS, "graders": graders, "max_new_tokens": 6, **fields}
    async with site.worker():
        done = await site.ended((await site.evaluate(**wanted)).name)
    assert done.state == Evaluation.STATE_SUCCEEDED, done.error
    return done


async def tried(site: Site, grader: Grader, samples: Sequence[Sample]) -> list[SampleGrade]:
    request = GradeSamplesRequest(parent=site.PARENT, grader=grader, samples=samples)
    return [one async for answer in site.stream("GradeSamples", request) for one in answer.grades]


class JobDesk:
    """A reinforcement job's side of its worker, as far as grading asks it."""

    def __init__(self, folder: Path, grader: Grader) -> None:
        self.scratch = folder
        self.task = task_pb2.Task()
        self.task.train.job.reinforcement.grader.CopyFrom(grader)

    def check(self) -> None:
        """It goes on."""

    def scored(
        self, grader: RemoteGrader, samples: Sequence[Sample], most_errors: int
    ) -> list[float | GradingError]:
        found = scored(grader, samples, RewardAddresses(["127.0.0.1"]), self.check, most_errors)
        return [
            GradingError(one.reason, one.message) if isinstance(one, RewardError) else one for one in found
        ]


def rewarded(
    folder: Path, grader: Grader, rows: Sequence[Prediction], items: Sequence[str]
) -> list[tuple[float | None, str | None]]:
    """What a reinforcement job on these records makes of all answers: its reward, or its reason for none."""
    texts = [answer.text for row in rows for answer in row.answers]
    columns = {"row": np.arange(len(items)), "record": list(items)}
    records = Records()
    records.add(pyarrow.RecordBatch.from_pydict({name: pyarrow.array(c) for name, c in columns.items()}))
    desk: Any = JobDesk(folder, grader)
    job = JobRollouts(desk, records, lambda ids, _: texts[ids[0]], frozenset())
    drawn = [
        Rollout(
            group=row.row,
            sample=sample,
            row=row.row,
            prompt=(1,),
            token_ids=(len(row.answers) * row.row + sample,),
            logprobs=(-1.0,),
            finish_reason=FinishReason.STOP,
        )
        for row in rows
        for sample in range(len(row.answers))
    ]
    return [(reward.score, reward.reason) for reward in job.graded(drawn, "TRAIN", 10_000)]


def outcome(grade: SampleGrade) -> tuple[float | None, str | None]:
    if grade.HasField("score"):
        return grade.score, None
    return None, status_to_failure(grade.error).reason


async def test_an_evaluation_a_job_and_a_trial_give_the_same_answer_the_same_score(
    site: Site, tmp_path: Path
) -> None:
    items = [record_to_json(thing(number)) for number in range(RECORDS)]
    with rewarding(by_length) as (address, _):
        inner = MultiGrader(graders={"a": far(address), "b": VOWEL}, calculate_output="0.5 * a + 0.5 * b")
        graders = [ALIKE, VOWEL, SAME, FIELDS, NUMBER, MIXED, far(address), Grader(name="asks", multi=inner)]
        done = await run(site, *graders)
        rows = await site.predictions(done.name)
        samples = [
            Sample(item_json=items[row.row], output_text=answer.text)
            for row in rows
            for answer in row.answers
        ]
        assert len({sample.output_text for sample in samples}) > 3
        for grader in graders:
            grades = [answer.grades[grader.name] for row in rows for answer in row.answers]
            assert grades == await tried(site, grader, samples)
            assert [outcome(one) for one in grades] == rewarded(tmp_path, grader, rows, items)
            shown = [answer.scores.get(f"grader.{grader.name}") for row in rows for answer in row.answers]
            assert shown == [outcome(one)[0] for one in grades]


async def test_scores_have_means_intervals_and_comparisons_of_their_kind(site: Site) -> None:
    guard = Guard(score=ScoreGuard(score="grader.vowel", max_loss=1.0))
    done = await run(site, VOWEL, ALIKE, MIXED, primary_score="grader.alike", guards=[guard])
    rows = await site.predictions(done.name)
    kinds = {
        "vowel": (api.SCORE_KIND_BINARY, api.COMPARISON_METHOD_SCORE_TEST),
        "alike": (api.SCORE_KIND_FRACTION, api.COMPARISON_METHOD_STUDENT_AND_LIKELIHOOD),
        "mixed": (api.SCORE_KIND_REAL, api.COMPARISON_METHOD_STUDENT),
    }
    for name, (kind, method) in kinds.items():
        score = f"grader.{name}"
        for arm in done.arm_results:
            (estimate,) = [one for one in arm.scores if one.score == score]
            values = [a.scores[score] for row in rows for a in row.answers if a.arm_id == arm.arm_id]
            assert estimate.value == pytest.approx(statistics.fmean(values))
            assert estimate.lower <= estimate.value <= estimate.upper
            assert (estimate.count, estimate.kind) == (RECORDS, kind)
            assert estimate.direction == api.SCORE_DIRECTION_HIGHER_IS_BETTER
        compared = [one for one in done.comparisons if one.score == score]
        assert len(compared) == 3
        assert {(one.kind, one.method) for one in compared} == {(kind, method)}
    assert done.verdict.score == "grader.alike"
    assert [one.guard.score.score for one in done.verdict.guards] == ["grader.vowel"]
    assert [(one.name, one.num_graded, one.num_errors) for one in done.grader_results] == [
        (name, RECORDS * len(ARMS), 0) for name in kinds
    ]
    assert not [warning for warning in done.warnings if "gave no score" in warning]


async def test_an_error_is_no_score_and_is_counted_with_its_first_words(site: Site) -> None:
    with rewarding(by_length) as (address, _):
        done = await run(site, NUMBER, far(address))
    number, remote = done.grader_results
    rows = await site.predictions(done.name)
    num_odd = {
        arm_id: sum(len(a.text) % 2 for row in rows for a in row.answers if a.arm_id == arm_id)
        for arm_id, _, _ in ARMS
    }
    assert number.num_errors == number.num_graded == RECORDS * len(ARMS)
    assert [one.reason for one in number.errors] == ["GRADER_INPUT_INVALID"]
    assert "reference must be a number and nothing else" in number.errors[0].first_message
    assert remote.num_errors == sum(num_odd.values()) > 0
    assert [(one.reason, one.count) for one in remote.errors] == [("REWARD_FAILED", remote.num_errors)]
    for arm in done.arm_results:
        by_name = {one.score: one for one in arm.scores}
        assert "grader.number" not in by_name
        assert by_name["grader.far"].count == RECORDS - num_odd[arm.arm_id]
    assert [warning.split(" answers")[0] for warning in done.warnings if "gave no score" in warning] == [
        "grader number gave no score to 36 of 36",
        f"grader far gave no score to {remote.num_errors} of 36",
    ]


async def test_a_service_that_fails_is_asked_no_more_and_the_evaluation_goes_on(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shares, "ROWS_A_BATCH", 4)
    monkeypatch.setattr(graders_module, "MOST_ERRORS", 6)

    def refuse(request: ScoreRequest, context: Any) -> ScoreResponse:
        return ScoreResponse(scores=[SampleScore(error="no")] * len(request.samples))

    with rewarding(refuse) as (address, rewards):
        done = await run(site, far(address), VOWEL, primary_score="grader.far")
        asked = sum(len(one.samples) for one in rewards.requests)
    assert asked == 8, "two batches, as the first one leaves two errors to go"
    result = done.grader_results[0]
    assert result.num_errors == result.num_graded == 36
    last = (await site.predictions(done.name))[-1].answers[-1].grades["far"].error.message
    assert f"reward service {address}: it was asked no more after 8 answers in a row" in last
    assert last.endswith("it could not score this sample: no")
    assert done.grader_results[1].num_errors == 0
    assert not [one for one in done.comparisons if one.score == "grader.far"]


async def test_what_a_record_lacks_is_found_before_any_arm_is_asked(site: Site) -> None:
    site.data.records["TEST"][5] = CompletionRecord(prompt="one and one", completion="2")
    async with site.worker():
        done = await site.ended((await site.evaluate(arms=ARMS, graders=[VOWEL, ALIKE])).name)
    assert done.state == Evaluation.STATE_FAILED
    assert status_to_failure(done.error).reason == "TEMPLATE_FIELD_MISSING"
    assert (
        "records must have what the grader alike reads of them, 1 of 12 have not; the first is test.jsonl:6: grader "
        "alike: reference names {{item.messages[-1].content}}, but there is no field 'messages' in item, which has "
        "'completion', 'prompt'"
    ) in done.error.message
    assert not done.num_records


async def test_a_worker_that_stops_leaves_grades_to_the_next(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shares, "ROWS_A_BATCH", 4)

    def slow(request: ScoreRequest, context: Any) -> ScoreResponse:
        held.wait(0.3)
        return by_length(request, context)

    held = threading.Event()
    with rewarding(slow) as (address, rewards):
        async with site.worker():
            made = await site.evaluate(arms=ARMS, graders=[VOWEL, far(address)], max_new_tokens=6)
            await until_answered(site, made.name, len(ARMS) * RECORDS + 8)
        first = sum(len(one.samples) for one in rewards.requests)
        async with site.worker():
            done = await site.ended(made.name)
        asked = sum(len(one.samples) for one in rewards.requests)
    assert done.state == Evaluation.STATE_SUCCEEDED, done.error
    wanted = len(ARMS) * RECORDS
    assert 4 <= first < wanted
    assert wanted <= asked <= wanted + 4, "at most the batch that was cut off is asked again"


async def test_the_grades_are_the_same_whoever_answers_and_in_whatever_order(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shares, "ROWS_A_BATCH", 4)
    with rewarding(by_length) as (address, _):
        alone = await run(site, ALIKE, MIXED, far(address))
        dealt = await run(site, far(address), MIXED, ALIKE, max_workers=3)
    assert list(dealt.grader_results) == list(alone.grader_results)[::-1]
    told = [
        {(one.candidate_arm_id, one.baseline_arm_id, one.score): one for one in done.comparisons}
        for done in (alone, dealt)
    ]
    assert told[0] == told[1]
    rows = [await site.predictions(done.name) for done in (alone, dealt)]
    assert json.dumps([str(row) for row in rows[0]]) == json.dumps([str(row) for row in rows[1]])
