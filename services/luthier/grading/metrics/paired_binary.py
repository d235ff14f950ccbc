"""Paired scores that are right or wrong: the score test of a difference of two shares, and the interval it inverts.

Of `count` records the candidate alone is right on `gained`, the baseline alone on `lost`. The statistic is that of
T. Tango, "Equivalence test and confidence interval for the difference in proportions for the paired-sample design",
Stat. Med. 1998, with the variance times n / (n - 1), as E. Pearson and I. Campbell ("Chi-squared and Fisher-Irwin tests
of two-by-two tables with small sample recommendations", Stat. Med. 2007) have it: without it a difference of zero is
left out by more than its 2.5 % on each side. At a difference of zero it is McNemar's statistic times (n - 1) / n.

All arguments broadcast against each other.
"""

from __future__ import annotations

from typing import cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
_HALVINGS = 60
_NO_VARIANCE = 1e-12


def deviation(gained: ArrayLike, lost: ArrayLike, count: ArrayLike, null: ArrayLike = 0.0) -> Array:
    """Return how many standard deviations the difference lies above `null`, were `null` the truth.

    The variance is that of the likeliest shares whose difference is `null`. A single record deviates from nothing.
    """
    right, wrong, total, delta = np.broadcast_arrays(
        *(np.asarray(each, dtype=np.float64) for each in (gained, lost, count, null))
    )
    # The share of records that the baseline alone has right is the larger root of a quadratic.
    linear = (2 * total - right + wrong) * delta - right - wrong
    constant = wrong * delta * (1 - delta)
    share = (np.sqrt(np.maximum(linear**2 + 8 * total * constant, 0.0)) - linear) / (4 * total)
    variance = total * np.maximum(2 * share + delta * (1 - delta), 0.0)
    distance = right - wrong - total * delta
    sure = variance <= _NO_VARIANCE * total
    certain = np.where(np.abs(distance) <= _NO_VARIANCE * total, 0.0, np.copysign(np.inf, distance))
    scaled = distance / np.sqrt(np.where(sure, 1.0, variance)) * np.sqrt((total - 1) / total)
    return np.where(total > 1, np.where(sure, certain, scaled), 0.0)


def p_values(gained: ArrayLike, lost: ArrayLike, count: ArrayLike, null: ArrayLike = 0.0) -> Array:
    """Return the two-sided p-values of differences that are `null`."""
    from scipy import special

    return cast("Array", 2 * special.ndtr(-np.abs(deviation(gained, lost, count, null))))


def bounds(
    gained: ArrayLike, lost: ArrayLike, count: ArrayLike, confidence: ArrayLike
) -> tuple[Array, Array]:
    """Return the smallest and the largest difference whose p-value is above 1 - confidence."""
    alpha = 1 - np.asarray(confidence, dtype=np.float64)
    right, wrong, total = (np.asarray(each, dtype=np.float64) for each in (gained, lost, count))
    found = (right - wrong) / total

    def outermost(end: float) -> Array:
        inside = np.broadcast_to(found, np.broadcast_shapes(found.shape, alpha.shape)).copy()
        outside = np.full_like(inside, end)
        at_end = p_values(right, wrong, total, outside) > alpha
        for _ in range(_HALVINGS):
            middle = (inside + outside) / 2
            within = p_values(right, wrong, total, middle) > alpha
            inside, outside = np.where(within, middle, inside), np.where(within, outside, middle)
        return np.where(at_end, end, inside)

    return outermost(-1.0), outermost(1.0)
