"""Paired scores that are shares from 0 to 1: a test of their mean difference, and the interval it inverts.

Three tests are held against each difference, and the largest p-value counts:
- Student's paired t-test, which knows how the differences that were seen scatter;
- the empirical likelihood ratio of a mean of differences which may also be -1 or 1, though none was seen: twelve
  records on which two arms differ by nothing do not show that they are the same. Its root is held against Student's
  distribution too, as A. Owen ("Empirical likelihood", 2001, 3.3) has it for few records;
- the exact binomial test of how often the worst happens, all else being as it was seen. The worst is a difference of
  -1 that was never seen, or the one to three farthest that were. Both others take the likelihood's curve for a normal
  one: of 48 records that gain 0.1 half the time and lose 0.9 once in twenty they call 5 % a win, as in 8.5 % of such
  data sets nothing is lost.
The interval is the hull of the three intervals. Shape suffixes: R data sets, N records, K numbers of the worst.
"""

from __future__ import annotations

from typing import cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
_HALVINGS = 50
_NEVER_BOUND = 1e12
_MOST_WORST = 3
"""Of more the normal curve is near enough (`test_coverage`), and this test would cost where amounts are small."""


def p_values(differences_RN: ArrayLike, null: ArrayLike = 0.0) -> Array:
    """Return the two-sided p-value of each data set's mean difference being `null`, which is in [-1, 1]."""
    from scipy import special

    found_RN = np.atleast_2d(np.asarray(differences_RN, dtype=np.float64))
    null_R = np.broadcast_to(np.asarray(null, dtype=np.float64), found_RN.shape[:1])
    count = found_RN.shape[-1]
    if count == 1:
        return np.ones_like(null_R)
    root_R = np.sqrt(likelihood_ratio(found_RN, null_R) * (count - 1) / count)
    by_student_R, by_worst_R = student_p_values(found_RN, null_R), worst_p_values(found_RN, null_R)
    by_likelihood_R = 2 * special.stdtr(count - 1, -root_R)
    return cast("Array", np.maximum(np.maximum(by_student_R, by_likelihood_R), by_worst_R))


def student_p_values(values_RN: Array, null_R: ArrayLike = 0.0, degrees: float | None = None) -> Array:
    """Return the two-sided p-values of Student's test; 1 of a single value, and of values that are all `null`.

    `degrees` of freedom are one less than the values unless it says another number.
    """
    from scipy import special

    count = values_RN.shape[-1]
    distance_R = values_RN.mean(axis=-1) - null_R
    if count == 1:
        return np.ones_like(distance_R)
    error_R = values_RN.std(axis=-1, ddof=1) / np.sqrt(count)
    sure_R = error_R == 0
    scaled_R = np.abs(distance_R) / np.where(sure_R, 1.0, error_R)
    certain_R = np.where(distance_R == 0, 1.0, 0.0)
    freedom = count - 1 if degrees is None else degrees
    return cast("Array", np.where(sure_R, certain_R, 2 * special.stdtr(freedom, -scaled_R)))


def likelihood_ratio(differences_RN: Array, null_R: ArrayLike) -> Array:
    """Return minus two logarithms of the empirical likelihood ratio of a mean of `null`, -1 and 1 among the support.

    Its maximum over weights is the maximum over one multiplier of sum log(1 + multiplier * (difference - null)), where
    the multiplier leaves no possible difference a negative weight.
    """
    null_R = np.broadcast_to(np.asarray(null_R, dtype=np.float64), differences_RN.shape[:1])
    away_RN = differences_RN - null_R[:, None]
    side_R = np.where(away_RN.mean(axis=-1) >= 0, 1.0, -1.0)
    away_RN = away_RN * side_R[:, None]
    # After turning all means upwards, the farthest below `null` that a difference can lie.
    reach_R = 1 + null_R * side_R
    low_R = np.zeros_like(reach_R)
    high_R = 1 / np.maximum(reach_R, 1 / _NEVER_BOUND)
    for _ in range(_HALVINGS):
        middle_R = (low_R + high_R) / 2
        slope_R = (away_RN / (1 + middle_R[:, None] * away_RN)).sum(axis=-1)
        low_R, high_R = np.where(slope_R > 0, middle_R, low_R), np.where(slope_R > 0, high_R, middle_R)
    # At the mean itself rounding may leave less than nothing.
    return cast("Array", 2 * np.maximum(np.log1p(low_R[:, None] * away_RN).sum(axis=-1), 0.0))


def worst_p_values(differences_RN: Array, null_R: ArrayLike) -> Array:
    """Return twice the chance that the worst is as rare as it was seen, were it frequent enough for a mean of `null`.

    Of several numbers of the worst the largest counts.
    """
    from scipy import special

    null_R = np.broadcast_to(np.asarray(null_R, dtype=np.float64), differences_RN.shape[:1])
    side_R = np.where(differences_RN.mean(axis=-1) >= null_R, 1.0, -1.0)
    worst_RK, rest_RK, number_K = _worst(differences_RN * side_R[:, None])
    gap_RK, above_RK = rest_RK - worst_RK, rest_RK - (null_R * side_R)[:, None]
    # All differences alike: their mean is `null` or cannot be.
    alike_RK = np.where(above_RK > 0, 1.0, 0.0)
    share_RK = np.where(gap_RK > 0, above_RK / np.where(gap_RK > 0, gap_RK, 1.0), alike_RK).clip(0, 1)
    count = differences_RN.shape[-1]
    chance_RK = special.betainc(count - number_K, number_K + 1, 1 - share_RK)
    return cast("Array", np.minimum(1.0, 2 * chance_RK.max(axis=-1)))


def _worst(upwards_RN: Array) -> tuple[Array, Array, NDArray[np.int64]]:
    """Return the mean of the worst K differences, that of all others, and K: 0 of them, which would be -1, and more."""
    count = upwards_RN.shape[-1]
    number_K = np.arange(min(_MOST_WORST, count - 1) + 1)
    lowest_RK = np.sort(np.partition(upwards_RN, number_K[-1], axis=-1)[:, : number_K[-1]], axis=-1)
    sums_RK = np.pad(np.cumsum(lowest_RK, axis=-1), ((0, 0), (1, 0)))
    worst_RK = np.where(number_K == 0, -1.0, sums_RK / np.maximum(number_K, 1))
    return worst_RK, (upwards_RN.sum(axis=-1, keepdims=True) - sums_RK) / (count - number_K), number_K


def _worst_bound(upwards_N: Array, confidence: float) -> float:
    """Return the smallest mean that `worst_p_values` allows for differences whose mean lies above it."""
    from scipy import special

    (worst_K,), (rest_K,), number_K = _worst(upwards_N[None, :])
    # The largest share of the worst that is not refused, as C. Clopper and E. Pearson have it.
    share_K = special.betaincinv(number_K + 1, len(upwards_N) - number_K, (1 + confidence) / 2)
    return float(((1 - share_K) * rest_K + share_K * worst_K).min())


def bounds(differences_N: ArrayLike, confidence: float) -> tuple[float, float]:
    """Return the smallest and the largest mean difference whose p-value is above 1 - confidence."""
    from scipy import optimize, special

    found_1N = np.atleast_2d(np.asarray(differences_N, dtype=np.float64))
    mean, count = float(found_1N.mean()), found_1N.shape[-1]
    if count == 1:
        return -1.0, 1.0
    quantile = float(special.stdtrit(count - 1, (1 + confidence) / 2))
    critical = float(quantile**2 * count / (count - 1))

    def excess(null: float) -> float:
        return float(likelihood_ratio(found_1N, null)[0]) - critical

    def outermost(end: float) -> float:
        if mean == end or excess(end) <= 0:
            return end
        return cast("float", optimize.brentq(excess, mean, end, xtol=1e-12, rtol=1e-12))

    half = quantile * float(found_1N.std(ddof=1) / np.sqrt(count))
    least, most = _worst_bound(found_1N[0], confidence), -_worst_bound(-found_1N[0], confidence)
    return (
        max(-1.0, min(outermost(-1.0), mean - half, least)),
        min(1.0, max(outermost(1.0), mean + half, most)),
    )
