"""All comparisons of an evaluation: each pair of arms on each score, corrected for how many they are.

There are three families, each corrected by itself, so that measuring more weakens neither the verdict nor a guard:
- those that the verdict rests on. A win needs all of them, so that no chance adds up, and they stand as they are. Of
  anything else any one of them is enough, and they share the error;
- those that guards rest on, which stand as they are: each says of its own guard, at its own 95 %, that it holds;
- all others, by Holm.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from luthier.evaluation.amounts import is_alike
from luthier.evaluation.completeness import Losses, is_whole_enough
from luthier.evaluation.worker.losses import losses_of
from luthier.evaluation.worker.scoring import Answer, differences, direction_of, preferences
from luthier.grading.graded_scores import scores_of
from luthier.grading.metrics.holm import ALPHA, Corrected, corrected, shared
from luthier.grading.metrics.intervals import MIN_PAIRS, verdict
from luthier.grading.metrics.paired import PairedDifference
from luthier.grading.metrics.scores import Score, ScoreKind
from luthier.v1 import evaluation_pb2

Correction = Callable[[Sequence[float]], list[Corrected]]
"""Of the p-values of a family."""
_METHODS = {
    ScoreKind.BINARY: evaluation_pb2.COMPARISON_METHOD_SCORE_TEST,
    ScoreKind.FRACTION: evaluation_pb2.COMPARISON_METHOD_STUDENT_AND_LIKELIHOOD,
    ScoreKind.REAL: evaluation_pb2.COMPARISON_METHOD_STUDENT,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pair:
    """Two arms on one score.

    Attributes:
        primary: the evaluation's verdict rests on it.
        guarded: a guard rests on it, and no verdict.
        wins: its judged arm is better, by what matters as far as is known.
        losses: records that it lacks.
    """

    candidate: str
    baseline: str
    score: Score
    name: str
    difference: PairedDifference
    primary: bool
    guarded: bool
    wins: bool
    losses: Losses

    @property
    def is_evidence(self) -> bool:
        """Whether it has enough pairs, and lacks few enough, to show anything."""
        count = self.difference.count
        return count >= MIN_PAIRS and is_whole_enough(count, self.losses.total)


def comparisons_of(
    evaluation: evaluation_pb2.Evaluation, answers: Mapping[str, Sequence[Answer]]
) -> list[evaluation_pb2.Comparison]:
    """Return every later arm against every earlier one on each score that both have.

    Fewer than `MIN_PAIRS` pairs, and such as lack too many records, are no evidence and take part in no correction.

    Raises:
        ValueError: a score is unknown or not of its kind.
        FailedPrecondition: LOSS_NOT_FINITE, a reference has no finite likelihood.
    """
    arms, named = list(answers), scores_of(evaluation.graders)
    pairs = [
        _pair(
            evaluation,
            (candidate, baseline),
            named(score),
            score,
            difference,
            losses_of(answers[candidate], answers[baseline], baseline, score),
        )
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
        levels |= _levels(primary, shared)
    levels |= _levels([pair for pair in pairs if not (pair.primary or pair.guarded)], corrected)
    return [_comparison(pair, levels.get(id(pair))) for pair in pairs]


def _pair(
    evaluation: evaluation_pb2.Evaluation,
    arms: tuple[str, str],
    score: Score,
    name: str,
    difference: PairedDifference,
    losses: Losses,
) -> _Pair:
    candidate, baseline = arms
    judged = evaluation.candidate_arm_id
    rival = baseline if candidate == judged else candidate
    is_judged = judged in arms
    primary = is_judged and name == evaluation.primary_score and rival in _prompting(evaluation)
    return _Pair(
        candidate=candidate,
        baseline=baseline,
        score=score,
        name=name,
        difference=difference,
        primary=primary,
        guarded=is_judged and not primary and _is_guarded(evaluation, name, rival),
        wins=primary
        and ((difference.value > 0) == (candidate == judged)) == score.higher_is_better
        and is_whole_enough(difference.count, losses.total)
        and _is_a_win(difference, evaluation.smallest_difference),
        losses=losses,
    )


def _prompting(evaluation: evaluation_pb2.Evaluation) -> set[str]:
    return {arm.arm_id for arm in evaluation.arms if not arm.tuned}


def _is_guarded(evaluation: evaluation_pb2.Evaluation, name: str, rival: str) -> bool:
    return any(
        guard.score.score == name
        and (
            rival == guard.score.baseline_arm_id
            if guard.score.baseline_arm_id
            else rival in _prompting(evaluation)
        )
        for guard in evaluation.guards
        if guard.WhichOneof("guarded") == "score"
    )


def _is_a_win(difference: PairedDifference, smallest: float) -> bool:
    """Whether a difference in favour of the judged arm is told, and not known to be too small to matter."""
    if difference.count < MIN_PAIRS or difference.p_value > ALPHA:
        return False
    interval = difference.interval(1 - ALPHA)
    return not is_alike(interval.lower, interval.upper, smallest)


def _wins(evaluation: evaluation_pb2.Evaluation, primary: Sequence[_Pair]) -> bool:
    return len(primary) == len(_prompting(evaluation)) and all(pair.wins for pair in primary)


def _levels(pairs: Sequence[_Pair], corrects: Correction) -> dict[int, Corrected]:
    telling = [pair for pair in pairs if pair.is_evidence]
    levels = corrects([pair.difference.p_value for pair in telling])
    return {id(pair): level for pair, level in zip(telling, levels, strict=True)}


def _comparison(pair: _Pair, level: Corrected | None) -> evaluation_pb2.Comparison:
    score = pair.score
    confidence = level.confidence if level else 1 - ALPHA
    interval = pair.difference.interval(confidence)
    shown = "INSUFFICIENT_EVIDENCE"
    if pair.is_evidence:
        shown = verdict(interval, higher_is_better=score.higher_is_better)
    interval = interval.told()
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
        num_lost_candidate=pair.losses.candidate,
        num_lost_baseline=pair.losses.baseline,
        num_lost_both=pair.losses.both,
    )
