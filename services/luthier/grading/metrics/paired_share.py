"""Paired scores that are shares from 0 to 1: a test of their mean difference, and the interval it inverts.

Two tests are held against each difference, and the larger p-value counts:
- Student's paired t-test, which knows how the differences that were seen scatter;
- the empirical likelihood ratio of a mean of differences which may also be -1 or 1, though none was seen: twelve
  records on which two arms differ by nothing do not show that they are the same. Its root is held against Student's
  distribution too, as A. Owen ("Empirical likelihood", 2001, 3.3) has it for few records.
The interval is the hull of the two intervals. Shape suffixes: R data sets, N records.
"""

from __future__ import annotations

from typing import cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
_HALVINGS = 50
_NEVER_BOUND = 1e12


def p_values(differences_RN: ArrayLike, null: ArrayLike = 0.0) -> Array:
    """Return the two-sided p-value of each data set's mean difference being `null`, which is in [-1, 1]."""
    from scipy import special

    found_RN = np.atleast_2d(np.asarray(differences_RN, dtype=np.float64))
    null_R = np.broadcast_to(np.asarray(null, dtype=np.float64), found_RN.shape[:1])
    count = found_RN.shape[-1]
    if count == 1:
        return np.ones_like(null_R)
    root_R = np.sqrt(likelihood_ratio(found_RN, null_R) * (count - 1) / count)
    return cast(
        "Array", np.maximum(student_p_values(found_RN, null_R), 2 * special.stdtr(count - 1, -root_R))
    )


def student_p_values(values_RN: Array, null_R: ArrayLike = 0.0) -> Array:
    """Return the two-sided p-values of Student's test; 1 of a single value, and of values that are all `null`."""
    from scipy import special

    count = values_RN.shape[-1]
    distance_R = values_RN.mean(axis=-1) - null_R
    if count == 1:
        return np.ones_like(distance_R)
    error_R = values_RN.std(axis=-1, ddof=1) / np.sqrt(count)
    sure_R = error_R == 0
    scaled_R = np.abs(distance_R) / np.where(sure_R, 1.0, error_R)
    certain_R = np.where(distance_R == 0, 1.0, 0.0)
    return cast("Array", np.where(sure_R, certain_R, 2 * special.stdtr(count - 1, -scaled_R)))


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
    return max(-1.0, min(outermost(-1.0), mean - half)), min(1.0, max(outermost(1.0), mean + half))
