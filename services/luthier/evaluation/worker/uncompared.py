"""Arms that the verdict needs side by side and that have no record in common: which records are left out, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field

from luthier.v1.evaluation_pb2 import Comparison, Evaluation

_LEARNT = "stand in what the tuned models learnt from"
_REST = "have no such score of both"


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """Rows that count in no comparison.

    Attributes:
        learnt: that tuned models learnt from.
        failed: that an arm could not answer, by its id.
    """

    learnt: Set[int] = field(default_factory=frozenset)
    failed: Mapping[str, Set[int]] = field(default_factory=dict)


def uncompared(
    evaluation: Evaluation, comparisons: Sequence[Comparison], left_out: LeftOut, num_records: int
) -> Iterator[str]:
    """Yield a warning for each prompting arm that the judged one was not compared with on the primary score."""
    judged, score = evaluation.candidate_arm_id, evaluation.primary_score
    compared = {
        frozenset((one.candidate_arm_id, one.baseline_arm_id)) for one in comparisons if one.score == score
    }
    for arm in evaluation.arms:
        if not judged or arm.tuned or frozenset((judged, arm.arm_id)) in compared:
            continue
        reasons = Counter(_why(row, (judged, arm.arm_id), left_out) for row in range(num_records))
        told = ", ".join(f"{count:,} {why}" for why, count in reasons.most_common())
        yield (
            f"{judged} and {arm.arm_id} cannot be compared on {score}: of {num_records:,} records {told}; "
            f"{_right(reasons)}"
        )


def _why(row: int, arms: tuple[str, str], left_out: LeftOut) -> str:
    if row in left_out.learnt:
        return _LEARNT
    failed = [arm_id for arm_id in arms if row in left_out.failed.get(arm_id, ())]
    return f"{' and '.join(failed)} could not answer" if failed else _REST


def _right(reasons: Counter[str]) -> str:
    """Return what would be right, by what took most records."""
    (most, _), *_others = reasons.most_common(1) or [(_REST, 0)]
    if most == _LEARNT:
        return "ask records that no training version holds: another split, or another dataset version"
    if most == _REST:
        return "choose a primary_score that answers of both have; a number needs two records at least"
    return "see why among the errors of its answers, mend that, and ask again"
