"""Records that a comparison of two arms lost: the score is of them, and not both arms have it."""

from __future__ import annotations

from collections.abc import Sequence

from luthier.evaluation.completeness import Losses
from luthier.evaluation.worker.scoring import Answer
from luthier.grading.metrics.scores import BITS_PER_BYTE, GRADED, JUDGED, PERPLEXITY


def losses_of(
    candidate: Sequence[Answer], baseline: Sequence[Answer], baseline_arm_id: str, score: str
) -> Losses:
    """Count the records that a comparison on a score lost.

    What both arms answered and neither has the score of is none: the record has no such field. But judges and graders
    are asked of every answer, so that what they gave neither is lost, as is what neither could answer: of that nobody
    knows what it would have.
    """
    of_pairs = any(score in one.points for one in candidate)
    found = [
        _lost_of_a_pair(mine, other, baseline_arm_id, score) if of_pairs else _lost(mine, other, score)
        for mine, other in zip(candidate, baseline, strict=True)
    ]
    return Losses(
        candidate=found.count("candidate"), baseline=found.count("baseline"), both=found.count("both")
    )


def _lost(mine: Answer, other: Answer, score: str) -> str:
    """Return whose score is missing; empty where nobody's is."""
    has_mine, has_other = (_has(one, score) and not one.failed for one in (mine, other))
    if has_mine != has_other:
        return "baseline" if has_mine else "candidate"
    is_for_all = score.startswith((JUDGED, GRADED))
    return "both" if not has_mine and (is_for_all or (mine.failed and other.failed)) else ""


def _lost_of_a_pair(mine: Answer, other: Answer, baseline_arm_id: str, score: str) -> str:
    """Return the same of answers that are held against each other: they have one score together."""
    if mine.failed != other.failed:
        return "candidate" if mine.failed else "baseline"
    return "" if baseline_arm_id in mine.points.get(score, {}) else "both"


def _has(answer: Answer, score: str) -> bool:
    if score == PERPLEXITY:
        return answer.num_tokens > 0
    if score == BITS_PER_BYTE:
        return answer.num_bytes > 0
    return score in answer.scores
