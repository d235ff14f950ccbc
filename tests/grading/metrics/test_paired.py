"""Differences of arms: intervals and p-values of one test, and those of SciPy where it has them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from tests.grading.metrics.simulated import Lopsided

from luthier.grading.metrics import paired_share
from luthier.grading.metrics.intervals import Interval
from luthier.grading.metrics.means import perplexity
from luthier.grading.metrics.paired import (
    PairedDifference,
    binary_difference,
    perplexity_difference,
    rate_difference,
    real_difference,
    share_difference,
)

Compare = Callable[[Sequence[float], Sequence[float]], PairedDifference]
KINDS = [binary_difference, share_difference, real_difference]
RIGHT_OR_WRONG = st.lists(
    st.tuples(st.sampled_from([0.0, 1.0]), st.sampled_from([0.0, 1.0])), min_size=1, max_size=40
)
FIFTHS = st.sampled_from([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
SHARES = st.lists(st.tuples(FIFTHS, FIFTHS), min_size=1, max_size=40)
CONFIDENCES = (0.8, 0.95, 0.999)


def philox(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(seed))


def sides(pairs: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [one for one, _ in pairs], [other for _, other in pairs]


def agrees(difference: PairedDifference) -> None:
    """An interval leaves zero out exactly where the p-value of the same test is small enough."""
    for confidence in CONFIDENCES:
        interval = difference.interval(confidence)
        leaves_zero_out = interval.lower > 0 or interval.upper < 0
        assert leaves_zero_out == (difference.p_value <= 1 - confidence), (difference, interval)
        assert interval.lower <= interval.value <= interval.upper


@given(RIGHT_OR_WRONG)
@settings(max_examples=60, deadline=None)
def test_interval_and_p_value_of_right_or_wrong_never_contradict(pairs: list[tuple[float, float]]) -> None:
    agrees(binary_difference(*sides(pairs)))


@given(SHARES)
@settings(max_examples=60, deadline=None)
def test_interval_and_p_value_of_shares_never_contradict(pairs: list[tuple[float, float]]) -> None:
    agrees(share_difference(*sides(pairs)))


@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5)), min_size=2, max_size=30))
@settings(max_examples=60, deadline=None)
def test_interval_and_p_value_of_numbers_never_contradict(pairs: list[tuple[float, float]]) -> None:
    agrees(real_difference(*sides(pairs)))


@pytest.mark.parametrize("compare", KINDS)
@given(pairs=RIGHT_OR_WRONG)
@settings(max_examples=30, deadline=None)
def test_arms_in_the_other_order_give_the_opposite(
    compare: Compare, pairs: list[tuple[float, float]]
) -> None:
    left, right = sides(pairs)
    there, back = compare(left, right), compare(right, left)
    assert there.p_value == pytest.approx(back.p_value)
    assert there.interval(0.95).lower == pytest.approx(-back.interval(0.95).upper, abs=1e-9)
    assert there.interval(0.95).upper == pytest.approx(-back.interval(0.95).lower, abs=1e-9)


def test_numbers_have_the_p_value_and_the_interval_of_scipy() -> None:
    generator = philox(3)
    left, right = generator.normal(0.3, 1, 30), generator.normal(0, 1, 30)
    wanted = stats.ttest_rel(left, right)
    found = real_difference(left.tolist(), right.tolist())
    assert found.p_value == pytest.approx(wanted.pvalue, rel=1e-12)
    bounds = wanted.confidence_interval(0.9)
    assert found.interval(0.9).lower == pytest.approx(bounds.low, rel=1e-12)
    assert found.interval(0.9).upper == pytest.approx(bounds.high, rel=1e-12)


def test_shares_that_scatter_widely_have_the_p_value_and_the_interval_of_scipy() -> None:
    generator = philox(4)
    left, right = generator.uniform(0.2, 1, 200), generator.uniform(0, 0.8, 200)
    wanted = stats.ttest_rel(left, right)
    found = share_difference(left.tolist(), right.tolist())
    bounds = wanted.confidence_interval(0.95)
    assert found.interval(0.95).lower == pytest.approx(bounds.low, abs=2e-3)
    assert found.interval(0.95).upper == pytest.approx(bounds.high, abs=2e-3)
    assert found.p_value >= wanted.pvalue


@pytest.mark.parametrize("count", [12, 48])
def test_shares_that_never_differ_leave_room_for_records_that_were_not_seen(count: int) -> None:
    interval = share_difference([0.5] * count, [0.5] * count).interval(0.95)
    # Of a share w of records that differ wholly, none is among so many in (1 - w) ** count of data sets.
    wanted = 1 - 0.025 ** (1 / count)
    assert (-interval.lower, interval.upper) == pytest.approx((wanted, wanted))


def test_one_record_shows_nothing() -> None:
    assert share_difference([1.0], [0.0]).interval(0.95).lower == -1.0
    assert binary_difference([1.0], [0.0]).p_value == 1.0
    assert real_difference([9.0], [0.0]).interval(0.95).lower == -math.inf


@pytest.mark.parametrize(
    "alike",
    [
        real_difference([10.0] * 12, [10.0] * 12),
        real_difference([11.0] * 12, [10.0] * 12),
        real_difference([0.1 + 0.2, 0.3] * 6, [0.3] * 12),
        real_difference([1000.1, 1000.4, 7.3] * 4, [1000.0, 1000.3, 7.2] * 4),
        rate_difference([2.0, 4.0, 8.0] * 4, [1.0, 2.0, 4.0] * 4, [10, 20, 40] * 4),
        perplexity_difference(([5.0, 10.0] * 6, [1, 2] * 6), ([4.0, 8.0] * 6, [1, 2] * 6)),
    ],
)
def test_differences_that_do_not_scatter_show_nothing(alike: PairedDifference) -> None:
    """They have no standard error but that of rounding, which would settle anything."""
    assert alike.p_value == 1.0
    assert alike.bounds(0.95) == (-math.inf, math.inf)
    assert alike.interval(0.95).told() == Interval(
        value=alike.value, lower=alike.value, upper=alike.value, count=12
    )


def test_one_record_that_differs_is_enough_for_an_interval() -> None:
    found = real_difference([11.0] * 11 + [10.0], [10.0] * 12).interval(0.95)
    assert 0 < found.lower < found.value < found.upper < math.inf
    assert found.told() is found


def test_a_difference_of_perplexities_counts_the_tokens_of_each_side() -> None:
    """Arms that are asked with different templates have references of different lengths."""
    sides_ = ([4.0, 6.0], [4, 4]), ([4.0, 6.0], [5, 3])
    difference = perplexity_difference(*sides_)
    values = [perplexity(*side).value for side in sides_]
    assert difference.value == pytest.approx(values[0] - values[1])


def test_perplexities_of_records_of_one_length_have_the_error_of_the_delta_method() -> None:
    generator = philox(5)
    tokens = [20] * 400
    left, right = (20 * generator.normal(mean, 0.05, 400) for mean in (1.0, 1.1))
    difference = perplexity_difference((left.tolist(), tokens), (right.tolist(), tokens))
    slopes = np.exp(left.mean() / 20) * left / 20 - np.exp(right.mean() / 20) * right / 20
    half = stats.t.ppf(0.975, 399) * slopes.std(ddof=1) / 20
    interval = difference.interval(0.95)
    assert (interval.upper - interval.lower) / 2 == pytest.approx(half, rel=0.01)
    assert difference.p_value < 1e-6


@pytest.mark.parametrize(
    ("compare", "candidate", "baseline", "message"),
    [
        (binary_difference, [1.0], [], "pairs must be complete, got 1 candidates and 0 baselines"),
        (binary_difference, [0.5], [1.0], r"scores must be 0 or 1, got \[.*0\.5"),
        (share_difference, [1.5], [1.0], r"scores must be in 0\.\.1, got"),
        (share_difference, [], [], "at least one record, got none"),
        (real_difference, [math.nan], [1.0], "the one at 0 is nan"),
    ],
)
def test_what_are_no_pairs_is_refused(
    compare: Compare, candidate: list[float], baseline: list[float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        compare(candidate, baseline)


def test_a_perplexity_beyond_numbers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"range of float64, got exp\(1000\)"):
        perplexity_difference(([1000.0, 1.0], [1, 1000]), ([1.0, 1.0], [1, 1]))


def test_a_difference_of_rates_is_a_ratio_of_sums_with_students_interval_over_the_jackknife() -> None:
    mine, baseline, sizes = [3.0, 8.0, 5.0, 9.0], [1.0, 7.0, 5.0, 6.0], [10, 20, 5, 40]
    difference = rate_difference(mine, baseline, sizes)
    assert difference.value == pytest.approx(6 / 75)
    without = [(6 - gone) / (75 - size) for gone, size in zip((2, 1, 0, 3), sizes, strict=True)]
    pseudo = [4 * 6 / 75 - 3 * value for value in without]
    degrees = 75**2 / sum(size**2 for size in sizes) - 1
    half = float(stats.t.ppf(0.975, degrees)) * float(np.std(pseudo, ddof=1)) / 2
    interval = difference.interval(0.95)
    assert (interval.lower, interval.upper) == pytest.approx((6 / 75 - half, 6 / 75 + half))
    assert rate_difference(baseline, mine, sizes).value == pytest.approx(-6 / 75)


def test_a_difference_of_rates_covers_the_truth_with_twelve_records() -> None:
    """A percentile bootstrap of as many does so in about 91 of 100."""
    generator = np.random.Generator(np.random.Philox(7))
    held = 0
    for _ in range(2000):
        sizes = generator.integers(80, 120, 12).tolist()
        amounts = [size * 0.5 + float(generator.normal()) * 10 for size in sizes]
        interval = rate_difference(amounts, [0.0] * 12, sizes).interval(0.95)
        held += interval.lower <= 0.5 <= interval.upper
    assert 0.935 <= held / 2000 <= 0.965


@pytest.mark.parametrize(("long", "degrees"), [(1, 11.0), (10, 441 / 111 - 1), (20, 31**2 / 411 - 1)])
def test_a_ratio_of_sums_is_as_sure_as_so_many_records_of_one_size(long: int, degrees: float) -> None:
    """Of twelve records one is longer: of perplexities too, whichever side has it."""
    generator = philox(11)
    sizes, even = [1] * 11 + [long], [1] * 12
    mine, other = (generator.gamma(9.0, 1 / 9, 12) for _ in range(2))
    rates = rate_difference((mine * sizes).tolist(), (other * sizes).tolist(), sizes)
    longer, alike = ((side * counts).tolist() for side, counts in ((mine, sizes), (other, even)))
    sides_ = (longer, sizes), (alike, even)
    for difference in (rates, perplexity_difference(*sides_), perplexity_difference(*sides_[::-1])):
        widths = [difference.interval(one).upper - difference.value for one in (0.9, 0.95)]
        quantiles = [float(stats.t.ppf((1 + one) / 2, degrees)) for one in (0.9, 0.95)]
        assert widths[1] / widths[0] == pytest.approx(quantiles[1] / quantiles[0])
        scaled = difference.value / (widths[1] / quantiles[1])
        assert difference.p_value == pytest.approx(2 * stats.t.sf(abs(scaled), degrees))


@pytest.mark.parametrize("long", [50, 100, 1000])
def test_records_that_are_worth_less_than_two_of_one_size_are_as_one(long: int) -> None:
    sizes = [1] * 11 + [long]
    found = rate_difference([2.0] * 11 + [1.5 * long], [1.0] * 12, sizes)
    assert (found.p_value, found.interval(0.95).lower, found.interval(0.95).upper) == (
        1.0,
        -math.inf,
        math.inf,
    )


def test_a_rate_of_one_record_has_no_interval_and_sizes_are_above_zero() -> None:
    alone = rate_difference([3.0], [1.0], [4]).interval(0.95)
    assert (alone.value, alone.lower, alone.upper) == (0.5, -math.inf, math.inf)
    with pytest.raises(ValueError, match="sizes must be above 0, got 0"):
        rate_difference([3.0, 1.0], [1.0, 1.0], [4, 0])


def test_a_share_that_all_records_have_is_held_as_exactly_as_right_or_wrong_can_be() -> None:
    """C. Clopper and E. Pearson's bound: of twelve wins each by the whole, one that was lost may not have been seen."""
    exact = stats.binomtest(12, 12).proportion_ci(0.95, method="exact")
    interval = share_difference([1.0] * 12, [0.0] * 12).interval(0.95)
    assert interval.lower == pytest.approx(2 * exact.low - 1)
    assert interval.upper == 1.0


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("gain", [0.1, 0.2])
@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.999])
def test_the_interval_of_lopsided_shares_is_where_their_test_turns(
    confidence: float, gain: float, sign: float
) -> None:
    case = Lopsided(count=24, discordance=0.5, gain=gain, loss=0.9)
    for differences in sign * case.differences(20):
        for bound in paired_share.bounds(differences, confidence):
            found = float(paired_share.p_values(differences, bound)[0])
            assert abs(bound) == 1 or found == pytest.approx(1 - confidence, abs=1e-6)
