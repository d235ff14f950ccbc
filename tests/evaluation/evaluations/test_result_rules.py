"""What a worker may say of an evaluation: no number of records below 0."""

from __future__ import annotations

import pytest

from luthier.evaluation.evaluations.result_rules import MAX_RECORDS, RESULT_LIMITS
from luthier.runtime.field_limits import limit_violations
from luthier.v1.evaluation_pb2 import ArmResult, Comparison, DriftResult, ScoreEstimate
from luthier.worker.v1.task_pb2 import EvaluateResult

_COUNTS = ("count", "num_lost_candidate", "num_lost_baseline", "num_lost_both")


def counting(field: str, number: int) -> EvaluateResult:
    """Return a result of which one field says so many records."""
    result = EvaluateResult()
    if field == "arm_results[0].num_errors":
        result.arm_results.append(ArmResult(num_errors=number))
    elif field == "arm_results[0].scores[0].count":
        result.arm_results.append(ArmResult(scores=[ScoreEstimate(count=number)]))
    elif field == "drift_results[0].num_unanswered":
        result.drift_results.append(DriftResult(num_unanswered=number))
    else:
        comparison = Comparison()
        setattr(comparison, field.rpartition(".")[2], number)
        result.comparisons.append(comparison)
    return result


@pytest.mark.parametrize(
    "field",
    [
        "arm_results[0].num_errors",
        "arm_results[0].scores[0].count",
        "drift_results[0].num_unanswered",
        *(f"comparisons[0].{name}" for name in _COUNTS),
    ],
)
@pytest.mark.parametrize(
    ("number", "is_taken"), [(-1, False), (1, True), (MAX_RECORDS, True), (MAX_RECORDS + 1, False)]
)
def test_numbers_of_records_are_in_their_range(field: str, number: int, is_taken: bool) -> None:
    found = [
        one.description
        for one in limit_violations(counting(field, number), RESULT_LIMITS, "result")
        if one.field == f"result.{field}"
    ]
    assert found == ([] if is_taken else [f"must be in 0..{MAX_RECORDS}, got {number}"])
