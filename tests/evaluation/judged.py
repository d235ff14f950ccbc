"""Evaluations with the comparisons of answers that are right as often as a test says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from luthier.evaluation.worker.comparing import comparisons_of
from luthier.evaluation.worker.scoring import Answer
from luthier.v1.evaluation_pb2 import ArmResult, Evaluation, EvaluationArm
from luthier.v1.verdict_pb2 import Guard


def evaluated(
    right: Mapping[str, int],
    *,
    tuned: int,
    count: int,
    smallest_difference: float = 0.0,
    guards: Sequence[Guard] = (),
    parsed: tuple[int, int] | None = None,
    first: bool = False,
    failed: Mapping[str, range] | None = None,
) -> Evaluation:
    """Return an evaluation of prompting arms and one tuned arm, each right on its first so many of `count` records.

    `parsed`: on how many the prompting arms and the tuned one give an object. `first`: the tuned arm comes first.
    `failed`: the records that an arm could not answer.
    """
    lost = failed or {}
    numbers = {"tuned": tuned, **right} if first else {**right, "tuned": tuned}
    evaluation = Evaluation(
        arms=[EvaluationArm(arm_id=arm_id, tuned=arm_id == "tuned") for arm_id in numbers],
        primary_score="exact_match",
        candidate_arm_id="tuned",
        smallest_difference=smallest_difference,
        guards=guards,
    )
    answers = {
        arm_id: _answers(number, count, parsed and parsed[arm_id == "tuned"], lost.get(arm_id, range(0)))
        for arm_id, number in numbers.items()
    }
    evaluation.comparisons.extend(comparisons_of(evaluation, answers))
    if failed is not None:
        evaluation.num_records = count
        evaluation.arm_results.extend(
            ArmResult(arm_id=arm_id, num_errors=len(lost.get(arm_id, ()))) for arm_id in numbers
        )
    return evaluation


def _answers(right: int, count: int, parsed: int | None, failed: range) -> list[Answer]:
    return [
        Answer(text="", finish_reason="UNSPECIFIED", scores={}, failed=True)
        if row in failed
        else Answer(
            text="",
            finish_reason="STOP",
            scores={
                "exact_match": float(row < right),
                **({} if parsed is None else {"field_match.parsed": float(row < parsed)}),
            },
        )
        for row in range(count)
    ]
