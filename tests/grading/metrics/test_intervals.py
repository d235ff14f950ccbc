from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.grading.metrics import intervals
from luthier.grading.metrics.intervals import (
    Interval,
    bootstrap_mean,
    bootstrap_perplexity,
    verdict,
    wilson,
)

SCORES = st.floats(min_value=-100, max_value=100, allow_nan=False)
PAIRS = st.lists(st.tuples(SCORES, SCORES), min_size=1, max_size=30)


def philox(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(seed))


@pytest.mark.parametrize(
    ("successes", "count", "lower", "upper"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_gives_the_published_intervals(successes: int, count: int, lower: float, upper: float) -> None:
    """R. G. Newcombe, "Two-sided confidence intervals for the single proportion", Stat. Med. 1998, method 3."""
    interval = wilson(successes, count)
    assert interval.value == successes / count
    assert interval.count == count
    assert interval.lower == pytest.approx(lower, abs=5e-5)
    assert interval.upper == pytest.approx(upper, abs=5e-5)


@given(count=st.integers(1, 10_000), data=st.data())
def test_wilson_bounds_are_the_roots_of_the_score_test(count: int, data: st.DataObject) -> None:
    successes = data.draw(st.integers(0, count))
    interval = wilson(successes, count)
    assert 0 <= interval.lower <= interval.value <= interval.upper <= 1
    for bound in (interval.lower, interval.upper):
        distance = (interval.value - bound) ** 2
        assert distance == pytest.approx(1.959963984540054**2 * bound * (1 - bound) / count, abs=1e-9)


def test_wilson_refuses_no_records() -> None:
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        wilson(0, 0)


def test_bootstrap_mean_follows_the_binomial_for_right_or_wrong() -> None:
    """The mean of a resample of 0 and 1 is binomial, so its quantiles are known."""
    count, right = 40, 28
    interval = bootstrap_mean([1.0] * right + [0.0] * (count - right), seed=5, num_resamples=40_000)
    share = right / count
    masses = [math.comb(count, k) * share**k * (1 - share) ** (count - k) for k in range(count + 1)]
    cumulated = list(itertools.accumulate(masses))
    assert interval.value == share
    assert interval.lower == pytest.approx(next(k for k in range(41) if cumulated[k] >= 0.025) / count)
    assert interval.upper == pytest.approx(next(k for k in range(41) if cumulated[k] >= 0.975) / count)


def test_bootstrap_mean_takes_the_same_resamples_in_blocks_of_any_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values = philox(1).normal(size=37).tolist()
    whole = bootstrap_mean(values, seed=3, num_resamples=1001)
    monkeypatch.setattr(intervals, "_INDICES_A_BLOCK", 37 * 10)
    assert bootstrap_mean(values, seed=3, num_resamples=1001) == whole
    assert bootstrap_mean(values, seed=4, num_resamples=1001) != whole


def test_bootstrap_perplexity_weights_records_by_their_tokens() -> None:
    # Two records of ln 2 and ln 8 nats a token, the second with three times the tokens: exp(mean) = 2 ** 2.5.
    nll = [10 * math.log(2), 30 * math.log(8)]
    interval = bootstrap_perplexity(nll, [10, 30], seed=0)
    assert interval.value == pytest.approx(2**2.5)
    assert interval.lower == pytest.approx(2.0)
    assert interval.upper == pytest.approx(8.0)
    assert interval.count == 2


def test_bootstrap_perplexity_is_certain_when_every_record_is_alike() -> None:
    interval = bootstrap_perplexity([3 * math.log(5), 7 * math.log(5)], [3, 7], seed=0)
    assert (interval.value, interval.lower, interval.upper) == pytest.approx((5.0, 5.0, 5.0))


@pytest.mark.parametrize(
    ("lower", "upper", "count", "higher", "lower_is_better"),
    [
        (0.1, 0.3, 10, "BETTER", "WORSE"),
        (-0.3, -0.1, 10, "WORSE", "BETTER"),
        (-0.1, 0.3, 10, "INCONCLUSIVE", "INCONCLUSIVE"),
        (0.0, 0.3, 10, "INCONCLUSIVE", "INCONCLUSIVE"),
        (0.0, 0.0, 10, "INCONCLUSIVE", "INCONCLUSIVE"),
        (0.1, 0.3, 9, "INSUFFICIENT_EVIDENCE", "INSUFFICIENT_EVIDENCE"),
    ],
)
def test_verdict_needs_an_interval_that_leaves_out_zero(
    lower: float, upper: float, count: int, higher: str, lower_is_better: str
) -> None:
    difference = Interval(value=(lower + upper) / 2, lower=lower, upper=upper, count=count)
    assert verdict(difference) == higher
    assert verdict(difference, higher_is_better=False) == lower_is_better


def test_any_int64_is_a_seed() -> None:
    values = [0.0, 1.0, 1.0]
    first = bootstrap_mean(values, seed=-3, num_resamples=100)
    assert bootstrap_mean(values, seed=-3, num_resamples=100) == first
