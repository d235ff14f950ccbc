"""How sure the score of one arm is: coverage, and what cannot be known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from luthier.grading.metrics.intervals import Interval
from luthier.grading.metrics.means import perplexity, rate_mean, real_mean, share_mean

SHARES = st.lists(st.floats(0, 1), min_size=1, max_size=40)
NUMBERS = st.lists(st.floats(-100, 100), min_size=1, max_size=40)


def philox(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(seed))


def holds(interval: Interval, truth: float) -> bool:
    return interval.lower <= truth <= interval.upper


@given(SHARES)
def test_no_share_is_certain(shares: list[float]) -> None:
    found = share_mean(shares)
    assert 0 <= found.lower <= found.value <= found.upper <= 1
    assert found.lower < found.upper
    assert found.value == pytest.approx(sum(shares) / len(shares))
    assert found.count == len(shares)


@pytest.mark.parametrize("right", [0.75, 0.9, 0.95])
def test_shares_that_were_all_seen_right_are_not_taken_for_all_there_are(right: float) -> None:
    """The percentile bootstrap called such an arm perfect, from any number of records."""
    drawn = (philox(int(100 * right)).random((200, 12)) < right).sum(axis=-1)
    # Of arms that had as many right one speaks for all: which ones these were does not count.
    held = {number: holds(share_mean([1.0] * number + [0.0] * (12 - number)), right) for number in set(drawn)}
    assert np.mean([held[number] for number in drawn]) >= 0.92


def test_one_record_tells_nothing_of_a_share_and_no_bounds_of_a_number() -> None:
    assert share_mean([1.0]) == Interval(value=1.0, lower=0.0, upper=1.0, count=1)
    assert real_mean([3.5]) == Interval(value=3.5, lower=3.5, upper=3.5, count=1)
    assert real_mean([0.1] * 7).lower == real_mean([0.1] * 7).upper
    found = perplexity([3 * math.log(5), 7 * math.log(5)], [3, 7])
    assert found.value == pytest.approx(5.0)
    assert found.lower == found.upper == found.value


@given(NUMBERS)
def test_a_number_has_students_interval_where_it_scatters(values: list[float]) -> None:
    found = real_mean(values)
    assert found.lower <= found.value <= found.upper
    if len(values) > 1 and np.ptp(values) > 1e-6:
        half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
        assert found.upper - found.value == pytest.approx(half)
        assert found.value - found.lower == pytest.approx(half)


def test_a_perplexity_weights_records_by_their_tokens_and_is_never_below_one() -> None:
    # Records of ln 2 and ln 8 nats a token, these with three times the tokens: exp(mean) = 2 ** 2.5.
    found = perplexity([10 * math.log(2), 10 * math.log(8), 20 * math.log(8)], [10, 10, 20])
    assert found.value == pytest.approx(2**2.5)
    assert 1.0 <= found.lower < 2
    assert found.upper > 8
    assert found.count == 3
    of_two = perplexity([10 * math.log(2), 30 * math.log(8)], [10, 30])
    assert of_two.lower == of_two.upper == pytest.approx(of_two.value), "one is most of it"


def test_perplexities_and_rates_are_held_as_often_as_they_say() -> None:
    generator, truth = philox(9), 1.5
    held = []
    for _ in range(1000):
        tokens = generator.integers(5, 40, 48)
        nll = tokens * truth * generator.gamma(4.0, 0.25, 48)
        found = perplexity(nll.tolist(), tokens.tolist())
        rate = rate_mean(nll.tolist(), tokens.astype(float).tolist())
        held.append(holds(found, math.exp(truth)))
        assert found.lower == pytest.approx(math.exp(rate.lower))
    assert 0.92 <= np.mean(held) <= 0.97


def test_what_no_float_can_hold_is_refused_and_bounds_beyond_it_are_not_known() -> None:
    with pytest.raises(ValueError, match=r"exp\(1000\)"):
        perplexity([1000.0, 1000.0], [1, 1])
    found = perplexity([600.0, 1.0], [1, 1])
    assert found.lower == found.upper == found.value == pytest.approx(math.exp(300.5))


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda: share_mean([]), "at least one record, got none"),
        (lambda: share_mean([0.5, 1.5]), r"in 0\.\.1, got \[1\.5, -0\.5\]"),
        (lambda: real_mean([1.0, math.nan]), "the one at 1 is nan"),
        (lambda: rate_mean([1.0, 1.0], [1.0, 0.0]), "sizes must be above 0, got 0"),
    ],
)
def test_what_is_no_score_is_refused_by_name(made: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        made()  # type: ignore[operator]
