"""Whether an evaluation tells its arms apart: scores that are 0 or 1 for all cannot, nor can too few records."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from luthier.evaluation.amounts import reached
from luthier.evaluation.completeness import WHOLE, common_words, is_whole_enough, losses_for
from luthier.v1.evaluation_pb2 import (
    SCORE_KIND_BINARY,
    SCORE_KIND_FRACTION,
    VERDICT_BETTER,
    VERDICT_WORSE,
    Evaluation,
    ScoreEstimate,
)

_SHARES = (SCORE_KIND_BINARY, SCORE_KIND_FRACTION)
_OF_A_FIELD = "field_match.field."


def blind_scores(evaluation: Evaluation) -> list[ScoreEstimate]:
    """Return the scores that are all 0, or all 1, for every arm, in the order of the first arm's.

    Single fields of records are left out: where all records have the same, nothing was to be told apart.
    """
    if len(evaluation.arm_results) < 2:
        return []
    first, *others = ({one.score: one for one in arm.scores} for arm in evaluation.arm_results)
    return [
        one
        for name, one in first.items()
        if one.kind in _SHARES
        and one.value in (0.0, 1.0)
        and (name == evaluation.primary_score or not name.startswith(_OF_A_FIELD))
        and all(name in scores and scores[name].value == one.value for scores in others)
    ]


def telling_scores(evaluation: Evaluation) -> list[str]:
    """Return the scores by which arms differ for sure, those that tell most pairs of arms apart first."""
    told: dict[str, int] = {}
    for one in evaluation.comparisons:
        if one.verdict in (VERDICT_BETTER, VERDICT_WORSE) and not one.score.startswith(_OF_A_FIELD):
            told[one.score] = told.get(one.score, 0) + 1
    return sorted(told, key=lambda score: -told[score])


def blind_warnings(evaluation: Evaluation) -> Iterator[str]:
    """Yield a warning for each score that cannot tell arms apart, with those that do."""
    telling = telling_scores(evaluation)
    for one in blind_scores(evaluation):
        yield f"{blind_words(evaluation, one)}; {_others(telling)}"


def loss_warnings(evaluation: Evaluation) -> Iterator[str]:
    """Yield a warning for each comparison of the verdict that lacks more than one record in fifty."""
    candidate = evaluation.candidate_arm_id
    for one in evaluation.comparisons:
        losses = losses_for(one, candidate)
        if one.primary and not is_whole_enough(one.count, losses.total, WHOLE):
            rival = one.baseline_arm_id if one.candidate_arm_id == candidate else one.candidate_arm_id
            common = common_words(one.count, losses, candidate, rival, one.score)
            yield f"{common}: what they show is true of all as far as the others are like them"


def blind_words(evaluation: Evaluation, score: ScoreEstimate) -> str:
    """Return in words that a score cannot tell arms apart."""
    end = "right" if score.value else "wrong"
    return (
        f"{score.score} is {reached(score.value, is_share=True)} for each of {len(evaluation.arm_results)} arms: where "
        f"all answers are {end} it cannot tell arms apart"
    )


def _others(telling: Sequence[str]) -> str:
    if not telling:
        return "no other score tells them apart either; measure another metric, e.g. BITS_PER_BYTE or CHRF"
    shown = ", ".join(telling[:3])
    return f"{shown} {'does' if len(telling) == 1 else 'do'}, and may be the primary_score"
