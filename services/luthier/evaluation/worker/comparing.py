"""All comparisons of an evaluation: each pair of arms on each score, corrected for how many they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from luthier.evaluation.worker.scoring import Answer, differences, direction_of, preferences
from luthier.grading.graded_scores import scores_of
from luthier.grading.metrics.holm import ALPHA, Corrected, corrected
from luthier.grading.metrics.intervals import MIN_PAIRS, verdict
from luthier.grading.metrics.paired import PairedDifference
from luthier.grading.metrics.scores import Score, ScoreKind
from luthier.v1 import evaluation_pb2

_METHODS = {
    ScoreKind.BINARY: evaluation_pb2.COMPARISON_METHOD_SCORE_TEST,
    ScoreKind.FRACTION: evaluation_pb2.COMPARISON_METHOD_STUDENT_AND_LIKELIHOOD,
    ScoreKind.REAL: evaluation_pb2.COMPARISON_METHOD_STUDENT,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pair:
    """Two arms on one score. `primary`: the evaluation's verdict rests on it; `wins`: its judged arm is better."""

    candidate: str
    baseline: str
    score: Score
    name: str
    difference: PairedDifference
    primary: bool
    wins: bool


def comparisons_of(
    evaluation: evaluation_pb2.Evaluation, answers: Mapping[str, Sequence[Answer]]
) -> list[evaluation_pb2.Comparison]:
    """Return every later arm against every earlier one on each score that both have.

    The comparisons that the verdict rests on stand as they are where each of them says that the judged arm is better:
    all of them must, so that no chance adds up. Otherwise they are corrected for each other, and all others for one
    another. Fewer than `MIN_PAIRS` pairs are no evidence and take part in no correction.

    Raises:
        ValueError: a score is unknown or not of its kind.
        FailedPrecondition: LOSS_NOT_FINITE, a reference has no finite likelihood.
    """
    arms, named = list(answers), scores_of(evaluation.graders)
    pairs = [
        _pair(evaluation, (candidate, baseline), named(score), score, difference)
        for later, candidate in enumerate(arms)
        for baseline in arms[:later]
        for score, difference in chain(
            differences(answers[candidate], answers[baseline], named),
            preferences(answers[candidate], baseline),
        )
        # Of a single record numbers have no interval.
        if difference.count > 1 or named(score).kind is not ScoreKind.REAL
    ]
    primary = [pair for pair in pairs if pair.primary]
    levels: dict[int, Corrected] = {}
    if not _wins(evaluation, primary):
        levels |= _corrected(primary)
    levels |= _corrected([pair for pair in pairs if not pair.primary])
    return [_comparison(pair, levels.get(id(pair))) for pair in pairs]


def _pair(
    evaluation: evaluation_pb2.Evaluation,
    arms: tuple[str, str],
    score: Score,
    name: str,
    difference: PairedDifference,
) -> _Pair:
    candidate, baseline = arms
    prompting = {arm.arm_id for arm in evaluation.arms if not arm.tuned}
    judged = evaluation.candidate_arm_id
    rival = baseline if candidate == judged else candidate
    is_up = (difference.value > 0) == (candidate == judged)
    return _Pair(
        candidate=candidate,
        baseline=baseline,
        score=score,
        name=name,
        difference=difference,
        primary=name == evaluation.primary_score and judged in (candidate, baseline) and rival in prompting,
        wins=difference.p_value <= ALPHA and is_up == score.higher_is_better,
    )


def _wins(evaluation: evaluation_pb2.Evaluation, primary: Sequence[_Pair]) -> bool:
    num_prompting = sum(not arm.tuned for arm in evaluation.arms)
    return len(primary) == num_prompting and all(
        pair.wins and pair.difference.count >= MIN_PAIRS for pair in primary
    )


def _corrected(pairs: Sequence[_Pair]) -> dict[int, Corrected]:
    telling = [pair for pair in pairs if pair.difference.count >= MIN_PAIRS]
    levels = corrected([pair.difference.p_value for pair in telling])
    return {id(pair): level for pair, level in zip(telling, levels, strict=True)}


def _comparison(pair: _Pair, level: Corrected | None) -> evaluation_pb2.Comparison:
    score = pair.score
    confidence = level.confidence if level else 1 - ALPHA
    interval = pair.difference.interval(confidence)
    shown = verdict(interval, higher_is_better=score.higher_is_better)
    return evaluation_pb2.Comparison(
        candidate_arm_id=pair.candidate,
        baseline_arm_id=pair.baseline,
        score=pair.name,
        difference=interval.value,
        lower=interval.lower,
        upper=interval.upper,
        p_value=pair.difference.p_value,
        count=interval.count,
        verdict=evaluation_pb2.Verdict.Value(f"VERDICT_{shown}"),
        kind=evaluation_pb2.ScoreKind.Value(f"SCORE_KIND_{score.kind}"),
        direction=direction_of(higher_is_better=score.higher_is_better),
        confidence=confidence,
        adjusted_p_value=level.p_value if level else None,
        method=_METHODS[score.kind],
        primary=pair.primary,
    )
