"""Intervals and tests over records: how sure a mean, a difference or a ratio is.

SciPy is imported where it is used: it takes over a second, and a worker is to answer before it scores.
Shape suffixes: N records, R resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

NUM_RESAMPLES = 10_000
MIN_PAIRS = 10
Verdict = Literal["BETTER", "WORSE", "INCONCLUSIVE", "INSUFFICIENT_EVIDENCE"]
Array = NDArray[np.float64]
_CONFIDENCE = 0.95
_INDICES_A_BLOCK = 1 << 22
_MAX_MEAN_NLL = 700.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """An estimate and its 95 % interval over `count` records."""

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


def bootstrap_mean(values: Sequence[float], *, seed: int, num_resamples: int = NUM_RESAMPLES) -> Interval:
    """Return the mean of values with its percentile bootstrap interval."""
    return _bootstrap((_checked(values),), np.mean, seed, num_resamples)


def bootstrap_difference(
    candidate: Sequence[float],
    baseline: Sequence[float],
    *,
    seed: int,
    num_resamples: int = NUM_RESAMPLES,
) -> Interval:
    """Return the mean of candidate minus baseline, paired by record, with its percentile bootstrap interval.

    Records are resampled, never the two sides apart: what makes a record hard for both cancels out.

    Raises:
        ValueError: the two have different lengths, or there is no record.
    """
    if len(candidate) != len(baseline):
        raise ValueError(
            f"pairs must be complete, got {len(candidate)} candidates and {len(baseline)} baselines"
        )
    return bootstrap_mean(_checked(candidate) - _checked(baseline), seed=seed, num_resamples=num_resamples)  # type: ignore[arg-type]


def bootstrap_perplexity(
    nll: Sequence[float], num_tokens: Sequence[int], *, seed: int, num_resamples: int = NUM_RESAMPLES
) -> Interval:
    """Return exp(sum of nll / sum of tokens) with its bootstrap interval over records; nll in nats by record.

    Raises:
        ValueError: there is no record, a value is not finite, or the perplexity is beyond the range of float64.
    """
    return _bootstrap((_checked(nll), _checked(num_tokens)), _perplexity, seed, num_resamples)


def bootstrap_perplexity_difference(
    candidate: tuple[Sequence[float], Sequence[int]],
    baseline: tuple[Sequence[float], Sequence[int]],
    *,
    seed: int,
    num_resamples: int = NUM_RESAMPLES,
) -> Interval:
    """Return perplexity of candidate minus that of baseline, paired by record; each is (nll in nats, tokens).

    Each side has tokens of its own: two arms may be asked with different templates.
    """
    sides = [_checked(side) for arm in (candidate, baseline) for side in arm]

    def difference(
        nll_RN: Array, tokens_RN: Array, other_nll_RN: Array, other_tokens_RN: Array, axis: int
    ) -> Array:
        return _perplexity(nll_RN, tokens_RN, axis) - _perplexity(other_nll_RN, other_tokens_RN, axis)

    return _bootstrap(sides, difference, seed, num_resamples)


def mcnemar(candidate: Sequence[float], baseline: Sequence[float]) -> float:
    """Return the exact two-sided McNemar p-value of paired right-or-wrong scores (1.0 or 0.0).

    Under the null each of the records on which the two disagree is a fair coin.

    Raises:
        ValueError: the two have different lengths, or a score is neither 0 nor 1.
    """
    wrong = [score for score in (*candidate, *baseline) if score not in (0.0, 1.0)]
    if wrong or len(candidate) != len(baseline):
        raise ValueError(
            f"scores must be pairs of 0 and 1, got {len(candidate)}, {len(baseline)} and {wrong[:3]}"
        )
    gained = sum(left > right for left, right in zip(candidate, baseline, strict=True))
    lost = sum(left < right for left, right in zip(candidate, baseline, strict=True))
    from scipy import stats

    return float(stats.binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def verdict(difference: Interval, *, higher_is_better: bool = True) -> Verdict:
    """Return what the interval of a paired difference (candidate minus baseline) shows."""
    if difference.count < MIN_PAIRS:
        return "INSUFFICIENT_EVIDENCE"
    if difference.lower > 0:
        return "BETTER" if higher_is_better else "WORSE"
    if difference.upper < 0:
        return "WORSE" if higher_is_better else "BETTER"
    return "INCONCLUSIVE"


def _checked(values: Sequence[float] | Sequence[int] | Array) -> Array:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or len(array) == 0:
        raise ValueError(f"there must be at least one record, got shape {array.shape}")
    wrong = np.flatnonzero(~np.isfinite(array))
    if len(wrong):
        raise ValueError(f"values must be finite, the one at {wrong[0]} is {array[wrong[0]]}")
    return array


def _perplexity(nll_RN: Array, tokens_RN: Array, axis: int) -> Array:
    mean_nll_R = nll_RN.sum(axis=axis) / tokens_RN.sum(axis=axis)
    highest = float(mean_nll_R.max())
    if highest > _MAX_MEAN_NLL:
        raise ValueError(f"perplexity must be in the range of float64, got exp({highest:g})")
    power: Array = np.exp(mean_nll_R)
    return power


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
