"""Records that a comparison of two arms lost: the score is of them, and not both arms have it."""

from __future__ import annotations

from collections.abc import Sequence

from luthier.evaluation.completeness import Losses
from luthier.evaluation.worker.scoring import Answer
from luthier.grading.metrics.scores import BITS_PER_BYTE, PERPLEXITY


def losses_of(candidate: Sequence[Answer], baseline: Sequence[Answer], score: str) -> Losses:
    """Count the records that a comparison on a score lost.

    What both arms answered and neither has the score of is none: the record has no such field, or whoever was to judge
    both did not, which is counted elsewhere. Of what neither could answer nobody knows, so that it is one.
    """
    of_pairs = any(score in one.points for one in candidate)
    found = [
        _lost(mine, other, score, of_pairs=of_pairs) for mine, other in zip(candidate, baseline, strict=True)
    ]
    return Losses(
        candidate=found.count("candidate"), baseline=found.count("baseline"), both=found.count("both")
    )


def _lost(mine: Answer, other: Answer, score: str, *, of_pairs: bool) -> str:
    """Return whose score is missing; empty where nobody's is."""
    if mine.failed and other.failed:
        return "both"
    # Answers that are held against each other have one score together.
    has_mine, has_other = (
        (not one.failed if of_pairs else _has(one, score) and not one.failed) for one in (mine, other)
    )
    if has_mine == has_other:
        return ""
    return "baseline" if has_mine else "candidate"


def _has(answer: Answer, score: str) -> bool:
    if score == PERPLEXITY:
        return answer.num_tokens > 0
    if score == BITS_PER_BYTE:
        return answer.num_bytes > 0
    return score in answer.scores
