"""Arms without a common record: which of them lost which records, why, and what would be right."""

from __future__ import annotations

import pytest

from luthier.evaluation.worker.uncompared import LeftOut, uncompared
from luthier.v1.evaluation_pb2 import Comparison, Evaluation, EvaluationArm

EVALUATION = Evaluation(
    candidate_arm_id="tuned",
    primary_score="chrf",
    arms=[
        EvaluationArm(arm_id="zero"),
        EvaluationArm(arm_id="few"),
        EvaluationArm(arm_id="older", tuned=True),
        EvaluationArm(arm_id="tuned", tuned=True),
    ],
)
FEW = Comparison(candidate_arm_id="few", baseline_arm_id="tuned", score="chrf")


@pytest.mark.parametrize(
    ("left_out", "said"),
    [
        (
            LeftOut(learnt={0, 1, 2}, failed={"zero": {3}}),
            "of 4 records 3 stand in what the tuned models learnt from, 1 zero could not answer; ask records that no "
            "training version holds",
        ),
        (
            LeftOut(failed={"tuned": {0, 1}, "zero": {1, 2, 3}, "few": {0, 1, 2, 3}}),
            "of 4 records 2 zero could not answer, 1 tuned could not answer, 1 tuned and zero could not answer; see "
            "why among the errors",
        ),
        (
            LeftOut(learnt={0}),
            "3 have no such score of both, 1 stand in what the tuned models learnt from; choose",
        ),
    ],
)
def test_each_reason_is_counted_and_the_commonest_says_what_would_be_right(
    left_out: LeftOut, said: str
) -> None:
    (warning,) = uncompared(EVALUATION, [FEW], left_out, 4)
    assert warning.startswith("tuned and zero cannot be compared on chrf: ")
    assert said in warning


def test_a_comparison_on_another_score_does_not_make_up_for_it() -> None:
    other = Comparison(candidate_arm_id="tuned", baseline_arm_id="zero", score="exact_match")
    assert [one.split(" cannot")[0] for one in uncompared(EVALUATION, [FEW, other], LeftOut(), 4)] == [
        "tuned and zero"
    ]
    right = Comparison(candidate_arm_id="tuned", baseline_arm_id="zero", score="chrf")
    assert list(uncompared(EVALUATION, [FEW, right], LeftOut(), 4)) == []


def test_without_a_judged_arm_nothing_is_missing() -> None:
    assert list(uncompared(Evaluation(arms=EVALUATION.arms, primary_score="chrf"), [], LeftOut(), 4)) == []
