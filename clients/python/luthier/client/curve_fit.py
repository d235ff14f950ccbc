"""What a score gains by more data: a line through scores and the logarithm of the number of records.

Weighted least squares of the score on the binary logarithm of records, each score with the weight of its interval; of
three or so points a curve with more freedom, such as a power law with a floor, would go through all of them and tell
nothing. Arms are scored on the same records, so that their errors go together and the slope is surer than said.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from luthier.client.scores import (
    difference_words,
    estimate_words,
    has_bounds,
    is_share,
    lower_is_better,
    verdict_word,
)
from luthier.v1.evaluation_pb2 import (
    VERDICT_BETTER,
    VERDICT_INCONCLUSIVE,
    VERDICT_WORSE,
    Comparison,
    Evaluation,
    ScoreEstimate,
)
from luthier.v1.fine_tuning_job_pb2 import FineTuningJob

CURVE_LABEL = "learning-curve"
"""Of a job: the curve that it is a point of. Of an evaluation: the curve that it measures."""
RECORDS_LABEL = "learning-curve-records"
"""Of a job: how many records it learns from."""
RUNS_WORDS = "All intervals are of the records asked: how much another run would change is not in them."
_QUANTILE = 1.959963984540054


@dataclass(frozen=True, slots=True, kw_only=True)
class CurvePoint:
    """A model that learnt from part of the data: its arm, from how many records, and how it scored."""

    arm_id: str
    num_records: int
    estimate: ScoreEstimate


@dataclass(frozen=True, slots=True, kw_only=True)
class CurveFit:
    """What each doubling of the data has brought, with its 95 % interval, and the score at one record.

    The interval is wider where the scores lie farther from the line than their own intervals explain.
    """

    at_one: float
    per_doubling: float
    lower: float
    upper: float

    def at(self, num_records: float) -> float:
        """Return the score on the line."""
        return self.at_one + self.per_doubling * math.log2(num_records)


def curve_points(evaluation: Evaluation, jobs: Mapping[str, FineTuningJob]) -> list[CurvePoint]:
    """Return the points of an evaluation's curve, by records; `jobs` made the models, by the models' names.

    Empty where fewer than two of its arms are points of one curve.
    """
    score = evaluation.primary_score
    results = {one.arm_id: {entry.score: entry for entry in one.scores} for one in evaluation.arm_results}
    found = []
    for arm in evaluation.arms:
        labels = jobs[arm.model].labels if arm.model in jobs else {}
        estimate = results.get(arm.arm_id, {}).get(score)
        if RECORDS_LABEL in labels and labels[RECORDS_LABEL].isdecimal() and estimate is not None:
            num_records = int(labels[RECORDS_LABEL])
            found.append(CurvePoint(arm_id=arm.arm_id, num_records=num_records, estimate=estimate))
    found.sort(key=lambda point: point.num_records)
    return found if len({point.num_records for point in found}) > 1 else []


def fitted(points: Sequence[CurvePoint]) -> CurveFit:
    """Return the line through two points or more, of different numbers of records."""
    places = [math.log2(point.num_records) for point in points]
    scores = [point.estimate.value for point in points]
    errors = [(point.estimate.upper - point.estimate.lower) / (2 * _QUANTILE) for point in points]
    # One score without a spread would hold the line alone.
    is_weighted = min(errors) > 0
    weights = [error**-2 if is_weighted else 1.0 for error in errors]
    total = sum(weights)
    place = sum(w * x for w, x in zip(weights, places, strict=True)) / total
    score = sum(w * y for w, y in zip(weights, scores, strict=True)) / total
    spread = sum(w * (x - place) ** 2 for w, x in zip(weights, places, strict=True))
    slope = (
        sum(w * (x - place) * (y - score) for w, x, y in zip(weights, places, scores, strict=True)) / spread
    )
    left = (
        w * (y - score - slope * (x - place)) ** 2 for w, x, y in zip(weights, places, scores, strict=True)
    )
    scatter = sum(left) / (len(points) - 2) if len(points) > 2 else 0.0
    if is_weighted:
        variance = max(1.0, scatter) / spread
    else:
        own = sum(error**2 * (x - place) ** 2 for error, x in zip(errors, places, strict=True)) / spread**2
        variance = max(own, scatter / spread)
    half = _QUANTILE * math.sqrt(variance)
    return CurveFit(at_one=score - slope * place, per_doubling=slope, lower=slope - half, upper=slope + half)


def more_data_words(evaluation: Evaluation, points: Sequence[CurvePoint]) -> str:
    """Return whether more data would help, in a few sentences with their numbers.

    The last step decides, by its paired comparison where the evaluation has it: what the first records have brought
    says nothing of what others would.
    """
    fit, before, last = fitted(points), points[-2], points[-1]
    step = _step(evaluation, points)
    share, name = is_share(last.estimate), last.estimate.score
    gained = _change_words(fit.per_doubling, fit.lower, fit.upper, is_share=share)
    if step.verdict == VERDICT_BETTER:
        twice = 2 * last.num_records
        doublings = math.log2(last.num_records / before.num_records)
        foretold = last.estimate.value + step.difference / doublings
        foretold = min(1.0, max(0.0, foretold)) if share else foretold
        shown = f"{100 * foretold:.1f} %" if share else f"{foretold:.4g}"
        said = (
            f"More data would help, if the last step goes on: at {twice:,} records {name} would be {shown}."
        )
    elif step.verdict == VERDICT_WORSE:
        said = f"More data made {name} worse in the last step."
    else:
        said = "Whether more data would help is not seen in the last step."
    return (
        f"{said} From {before.num_records:,} to {last.num_records:,} records: {difference_words(step)}, "
        f"{verdict_word(step.verdict)}. Over all parts each doubling has changed {name} by {gained}. {RUNS_WORDS}"
    )


def point_rows(points: Sequence[CurvePoint]) -> list[tuple[str, str, str]]:
    """Return records, arm and score of each point in words."""
    return [(f"{point.num_records:,}", point.arm_id, estimate_words(point.estimate)) for point in points]


def _change_words(value: float, lower: float, upper: float, *, is_share: bool) -> str:
    if lower == upper:
        return f"{100 * value:+.1f} pp" if is_share else f"{value:+.4g}"
    if is_share:
        return f"{100 * value:+.1f} pp [{100 * lower:+.1f}, {100 * upper:+.1f}]"
    return f"{value:+.4g} [{lower:+.4g}, {upper:+.4g}]"


def _step(evaluation: Evaluation, points: Sequence[CurvePoint]) -> Comparison:
    """Return the comparison of the last point with the one before: the evaluation's, else by both intervals."""
    before, last = points[-2], points[-1]
    score, pair = last.estimate.score, (last.arm_id, before.arm_id)
    for one in evaluation.comparisons:
        if one.score == score and (one.candidate_arm_id, one.baseline_arm_id) == pair:
            return one
    difference = last.estimate.value - before.estimate.value
    sides = [(one.estimate.upper - one.estimate.lower) / 2 for one in (before, last)]
    known = all(has_bounds(one.estimate) for one in (before, last))
    half = math.hypot(*sides) if known else 0.0
    is_worse = (difference > 0) == lower_is_better(last.estimate)
    seen = VERDICT_WORSE if is_worse else VERDICT_BETTER
    return Comparison(
        candidate_arm_id=last.arm_id,
        baseline_arm_id=before.arm_id,
        score=score,
        kind=last.estimate.kind,
        direction=last.estimate.direction,
        difference=difference,
        lower=difference - half,
        upper=difference + half,
        verdict=seen if known and abs(difference) > half else VERDICT_INCONCLUSIVE,
    )
