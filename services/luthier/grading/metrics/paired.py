"""The difference between two arms on the same records: one method for each kind of score.

A difference has p-values and intervals of one and the same test, so that an interval of confidence 1 - alpha leaves
zero out exactly where the p-value is at most alpha:

| kind | method |
|---|---|
| BINARY | the score test of `paired_binary` |
| FRACTION | the largest p-value of Student's test, the empirical likelihood and the worst's, `paired_share` |
| REAL | Student's test of differences, or of the jackknife's pseudo-values where the score is no mean of records |

A ratio of sums rests on its long records: it has the degrees of freedom of as many records of one size as it is worth,
(sum of sizes)^2 / sum of sizes^2 (L. Kish, "Survey Sampling", 1965), less one. With those of all records twelve of 5 to
160 tokens are called better in 3.8 % where there is no difference, with these in 2.2 %.

Numbers that do not scatter, or of which there is one, do not tell how sure their mean is: any mean of a number that was
not seen is possible. Their bounds are infinite, and their p-value is 1.

SciPy is imported where it is used: it takes over a second, and a worker is to answer before it scores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from luthier.grading.metrics import paired_binary, paired_share
from luthier.grading.metrics.intervals import Interval, perplexity_of

Array = NDArray[np.float64]
_ROUNDING = 1e-12
"""A standard error below this share of what was measured is rounding."""
_LEAST_DEGREES = 1.0
"""Of fewer they are worth less than two records of one size, and are as one alone: bounds would be beyond all that
scores can be (at 0.2 degrees 770,000 errors), and what is computed from them as far from the truth."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedDifference:
    """Mean of candidate minus baseline over `count` records, its two-sided p-value against zero, and its test's bounds.

    `bounds` takes a confidence, e.g. 0.95.
    """

    value: float
    count: int
    p_value: float
    bounds: Callable[[float], tuple[float, float]]

    def interval(self, confidence: float) -> Interval:
        """Return the difference with its interval of this confidence; the estimate is never outside of it."""
        lower, upper = self.bounds(confidence)
        return Interval(
            value=self.value,
            lower=min(lower, self.value),
            upper=max(upper, self.value),
            count=self.count,
        )


def binary_difference(candidate: Sequence[float], baseline: Sequence[float]) -> PairedDifference:
    """Compare scores that are 0 or 1.

    Raises:
        ValueError: the two have different lengths, there is no record, or a score is neither 0 nor 1.
    """
    left, right = _pairs(candidate, baseline)
    wrong = [score for score in (*left, *right) if score not in (0.0, 1.0)]
    if wrong:
        raise ValueError(f"scores must be 0 or 1, got {wrong[:3]}")
    gained, lost, count = int((left > right).sum()), int((left < right).sum()), len(left)

    def bounds(confidence: float) -> tuple[float, float]:
        lower, upper = paired_binary.bounds(gained, lost, count, confidence)
        return float(lower), float(upper)

    return PairedDifference(
        value=(gained - lost) / count,
        count=count,
        p_value=float(paired_binary.p_values(gained, lost, count)),
        bounds=bounds,
    )


def share_difference(candidate: Sequence[float], baseline: Sequence[float]) -> PairedDifference:
    """Compare scores from 0 to 1.

    Raises:
        ValueError: the two have different lengths, there is no record, or a score lies elsewhere.
    """
    left, right = _pairs(candidate, baseline)
    wrong = [float(score) for score in (*left, *right) if not 0 <= score <= 1]
    if wrong:
        raise ValueError(f"scores must be in 0..1, got {wrong[:3]}")
    differences = left - right
    return PairedDifference(
        value=float(differences.mean()),
        count=len(differences),
        p_value=float(paired_share.p_values(differences)[0]),
        bounds=lambda confidence: paired_share.bounds(differences, confidence),
    )


def real_difference(candidate: Sequence[float], baseline: Sequence[float]) -> PairedDifference:
    """Compare scores that are any number.

    Raises:
        ValueError: the two have different lengths, there is no record, or a score is not finite.
    """
    left, right = _pairs(candidate, baseline)
    differences = left - right
    return _student(float(differences.mean()), differences, _largest(left, right))


def perplexity_difference(
    candidate: tuple[Sequence[float], Sequence[int]], baseline: tuple[Sequence[float], Sequence[int]]
) -> PairedDifference:
    """Compare perplexities of references; each side is (negative log-likelihood in nats, tokens) by record.

    Each side has tokens of its own: two arms may be asked with different templates. A perplexity is no mean of records,
    so the jackknife's pseudo-values stand for them (J. Tukey, "Bias and confidence in not-quite large samples", 1958).

    Raises:
        ValueError: the sides have different lengths, there is no record, a value is not finite, or a perplexity is
            beyond the range of float64.
    """
    left, right = (_pairs(*side) for side in (candidate, baseline))
    if len(left[0]) != len(right[0]):
        raise ValueError(
            f"pairs must be complete, got {len(left[0])} candidates and {len(right[0])} baselines"
        )
    values, pseudo = zip(*(_jackknifed(perplexity_of, *side) for side in (left, right)), strict=True)
    degrees = min(_degrees(counts) for _, counts in (left, right))
    return _student(values[0] - values[1], pseudo[0] - pseudo[1], _largest(*pseudo), degrees)


def rate_difference(
    candidate: Sequence[float], baseline: Sequence[float], sizes: Sequence[float]
) -> PairedDifference:
    """Compare amounts for each unit of records' sizes, which both sides have: sum of differences / sum of sizes.

    A ratio of sums is no mean of records either, and is held as perplexities are.

    Raises:
        ValueError: the three have different lengths, there is no record, a value is not finite, or a size not above 0.
    """
    left, right = _pairs(candidate, baseline)
    _, counts = _pairs(candidate, sizes)
    if not (counts > 0).all():
        raise ValueError(f"sizes must be above 0, got {counts.min():g}")
    measured = _largest(left / counts, right / counts)
    return _student(*_jackknifed(np.divide, left - right, counts), measured, _degrees(counts))


def _jackknifed(statistic: Callable[..., Any], amounts: Array, counts: Array) -> tuple[float, Array]:
    """Return a statistic of two sums, and its pseudo-value of each record."""
    count = len(amounts)
    value = float(statistic(amounts.sum(), counts.sum()))
    if count == 1:
        return value, np.array([value])
    without = statistic(amounts.sum() - amounts, counts.sum() - counts)
    return value, count * value - (count - 1) * without


def _largest(*sides: Array) -> float:
    return max(float(np.abs(side).max()) for side in sides)


def _degrees(sizes: Array) -> float:
    """Return the degrees of freedom of a ratio of sums over records of these sizes."""
    largest = sizes.max()
    return float((sizes / largest).sum() ** 2 / ((sizes / largest) ** 2).sum()) - 1 if largest > 0 else 0.0


def _student(value: float, values: Array, measured: float, degrees: float | None = None) -> PairedDifference:
    """Return Student's test of `values` around `value`; `measured` is the largest amount that they are made of.

    `degrees` of freedom are one less than the values unless it says fewer.
    """
    count = len(values)
    freedom = count - 1 if degrees is None else degrees
    centred = values - values.mean() + value
    error = float(centred.std(ddof=1) / np.sqrt(count)) if count > 1 else 0.0
    if error <= _ROUNDING * measured or freedom < _LEAST_DEGREES:
        return PairedDifference(value=value, count=count, p_value=1.0, bounds=lambda _: (-np.inf, np.inf))

    def bounds(confidence: float) -> tuple[float, float]:
        from scipy import special

        half = float(special.stdtrit(freedom, (1 + confidence) / 2)) * error
        return value - half, value + half

    p_value = float(paired_share.student_p_values(centred[None, :], degrees=freedom)[0])
    return PairedDifference(value=value, count=count, p_value=p_value, bounds=bounds)


def _pairs(
    candidate: Sequence[float] | Sequence[int], baseline: Sequence[float] | Sequence[int]
) -> tuple[Array, Array]:
    if len(candidate) != len(baseline):
        raise ValueError(
            f"pairs must be complete, got {len(candidate)} candidates and {len(baseline)} baselines"
        )
    left, right = (np.asarray(side, dtype=np.float64) for side in (candidate, baseline))
    if len(left) == 0:
        raise ValueError("there must be at least one record, got none")
    for side in (left, right):
        wrong = np.flatnonzero(~np.isfinite(side))
        if len(wrong):
            raise ValueError(f"values must be finite, the one at {wrong[0]} is {side[wrong[0]]}")
    return left, right
