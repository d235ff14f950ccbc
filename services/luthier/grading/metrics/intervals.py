"""Intervals over records: how sure a mean or a ratio of one arm is. Differences of arms are in `paired`.

SciPy is imported where it is used: it takes over a second, and a worker is to answer before it scores.
Shape suffixes: N records, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

NUM_RESAMPLES = 10_000
MIN_PAIRS = 10
Verdict = Literal["BETTER", "WORSE", "INCONCLUSIVE", "INSUFFICIENT_EVIDENCE"]
Array = NDArray[np.float64]
_CONFIDENCE = 0.95
_INDICES_A_BLOCK = 1 << 22
_MAX_MEAN_NLL = 700.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """An estimate and its interval over `count` records."""

    value: float
    lower: float
    upper: float
    count: int


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


def bootstrap_mean(values: Sequence[float], *, seed: int, num_resamples: int = NUM_RESAMPLES) -> Interval:
    """Return the mean of values with its percentile bootstrap interval."""
    return _bootstrap((_checked(values),), np.mean, seed, num_resamples)


def bootstrap_perplexity(
    nll: Sequence[float], num_tokens: Sequence[int], *, seed: int, num_resamples: int = NUM_RESAMPLES
) -> Interval:
    """Return exp(sum of nll / sum of tokens) with its bootstrap interval over records; nll in nats by record.

    Raises:
        ValueError: there is no record, a value is not finite, or the perplexity is beyond the range of float64.
    """
    return _bootstrap((_checked(nll), _checked(num_tokens)), _perplexity, seed, num_resamples)


def bootstrap_rate(
    amounts: Sequence[float], sizes: Sequence[float], *, seed: int, num_resamples: int = NUM_RESAMPLES
) -> Interval:
    """Return the sum of amounts / the sum of sizes with its bootstrap interval over records.

    Raises:
        ValueError: there is no record, or a value is not finite.
    """
    return _bootstrap((_checked(amounts), _checked(sizes)), _rate, seed, num_resamples)


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
    if highest > _MAX_MEAN_NLL:
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


def _perplexity(nll_RN: Array, tokens_RN: Array, axis: int) -> Array:
    return perplexity_of(nll_RN.sum(axis=axis), tokens_RN.sum(axis=axis))


def _rate(amounts_RN: Array, sizes_RN: Array, axis: int) -> Array:
    rate: Array = amounts_RN.sum(axis=axis) / sizes_RN.sum(axis=axis)
    return rate


def _bootstrap(
    values: Sequence[Array], statistic: Callable[..., Any], seed: int, num_resamples: int
) -> Interval:
    """Percentile bootstrap over records that all of `values` tell of; memory is bounded by resampling in blocks."""
    count = len(values[0])
    value = float(statistic(*values, axis=-1))
    if count == 1:  # every resample is the record
        return Interval(value=value, lower=value, upper=value, count=count)
    from scipy import stats

    bounds = stats.bootstrap(
        values,
        statistic,
        paired=True,
        vectorized=True,
        confidence_level=_CONFIDENCE,
        method="percentile",
        n_resamples=num_resamples,
        batch=max(1, _INDICES_A_BLOCK // count),
        # Philox is counter-based: the same seed gives the same records on every machine.
        rng=np.random.Generator(np.random.Philox(seed % (1 << 64))),
    ).confidence_interval
    return Interval(value=value, lower=float(bounds.low), upper=float(bounds.high), count=count)
