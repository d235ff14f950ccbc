"""Intervals over records: what one is, those of shares that are right or wrong, and what one of a difference shows.

Differences of arms are in `paired`, the scores of one arm in `means`.
SciPy is imported where it is used: it takes over a second, and a worker is to answer before it scores.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

MIN_PAIRS = 10
Verdict = Literal["BETTER", "WORSE", "INCONCLUSIVE", "INSUFFICIENT_EVIDENCE"]
Array = NDArray[np.float64]
_CONFIDENCE = 0.95
MAX_MEAN_NLL = 700.0
"""Nats a token above which a perplexity leaves the range of float64."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """An estimate and its interval over `count` records."""

    value: float
    lower: float
    upper: float
    count: int

    def told(self) -> Interval:
        """Return it as messages tell it: bounds that nobody knows, which are infinite here, are the value itself."""
        if math.isfinite(self.upper - self.lower):
            return self
        return Interval(value=self.value, lower=self.value, upper=self.value, count=self.count)


def wilson(successes: int, count: int) -> Interval:
    """Return a proportion with its Wilson score interval.

    Source: E. B. Wilson, "Probable inference, the law of succession, and statistical inference", JASA 1927.

    Raises:
        ValueError: there is no record.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    from scipy import stats

    share = successes / count
    bounds = stats.binomtest(successes, count).proportion_ci(_CONFIDENCE, method="wilson")
    # Rounding must not leave the estimate outside of its interval at 0 and 1.
    return Interval(
        value=share, lower=min(share, float(bounds.low)), upper=max(share, float(bounds.high)), count=count
    )


def wilson_mean(shares: Sequence[float]) -> Interval:
    """Return the mean of values from 0 to 1 with Wilson's interval: no values with this mean scatter more than 0 and 1.

    Raises:
        ValueError: there is no value.
    """
    values = _checked(shares)
    count, share = len(values), float(values.mean())
    weight = NormalDist().inv_cdf((1 + _CONFIDENCE) / 2) ** 2 / count
    middle = (share + weight / 2) / (1 + weight)
    width = math.sqrt(weight * share * (1 - share) + weight**2 / 4) / (1 + weight)
    return Interval(
        value=share,
        lower=min(share, max(0.0, middle - width)),
        upper=max(share, min(1.0, middle + width)),
        count=count,
    )


def verdict(difference: Interval, *, higher_is_better: bool = True) -> Verdict:
    """Return what the interval of a paired difference (candidate minus baseline) shows."""
    if difference.count < MIN_PAIRS:
        return "INSUFFICIENT_EVIDENCE"
    if difference.lower > 0:
        return "BETTER" if higher_is_better else "WORSE"
    if difference.upper < 0:
        return "WORSE" if higher_is_better else "BETTER"
    return "INCONCLUSIVE"


def perplexity_of(nll: ArrayLike, num_tokens: ArrayLike) -> Array:
    """Return exp(nll / tokens), element by element; nll in nats.

    Raises:
        ValueError: one of them is beyond the range of float64.
    """
    mean_nll = np.asarray(nll, dtype=np.float64) / np.asarray(num_tokens, dtype=np.float64)
    highest = float(mean_nll.max())
    if highest > MAX_MEAN_NLL:
        raise ValueError(f"perplexity must be in the range of float64, got exp({highest:g})")
    power: Array = np.exp(mean_nll)
    return power


def _checked(values: Sequence[float] | Sequence[int] | Array) -> Array:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or len(array) == 0:
        raise ValueError(f"there must be at least one record, got shape {array.shape}")
    wrong = np.flatnonzero(~np.isfinite(array))
    if len(wrong):
        raise ValueError(f"values must be finite, the one at {wrong[0]} is {array[wrong[0]]}")
    return array
