from __future__ import annotations

import itertools
import math
import time
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.grading.metrics import intervals
from luthier.grading.metrics.intervals import (
    Interval,
    bootstrap_difference,
    bootstrap_mean,
    bootstrap_perplexity,
    bootstrap_perplexity_difference,
    mcnemar,
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


@given(values=st.lists(SCORES, min_size=1, max_size=30), seed=st.integers(0, 2**63 - 1))
@settings(max_examples=50)
def test_bootstrap_difference_of_identical_arms_is_exactly_zero(values: list[float], seed: int) -> None:
    interval = bootstrap_difference(values, values, seed=seed, num_resamples=200)
    assert interval == Interval(value=0.0, lower=0.0, upper=0.0, count=len(values))


@given(pairs=PAIRS, seed=st.integers(0, 2**63 - 1))
@settings(max_examples=50)
def test_bootstrap_difference_turns_its_sign_when_the_arms_are_swapped(
    pairs: list[tuple[float, float]], seed: int
) -> None:
    left, right = [one for one, _ in pairs], [other for _, other in pairs]
    there = bootstrap_difference(left, right, seed=seed, num_resamples=200)
    back = bootstrap_difference(right, left, seed=seed, num_resamples=200)
    assert back.value == pytest.approx(-there.value, abs=1e-9)
    assert back.lower == pytest.approx(-there.upper, abs=1e-9)
    assert back.upper == pytest.approx(-there.lower, abs=1e-9)


def test_bootstrap_difference_finds_by_pairs_what_shuffled_arms_hide() -> None:
    generator = philox(8)
    difficulty = generator.normal(0.0, 5.0, size=60)
    baseline = difficulty + generator.normal(0.0, 0.3, size=60)
    candidate = difficulty + 0.4 + generator.normal(0.0, 0.3, size=60)
    paired = bootstrap_difference(candidate.tolist(), baseline.tolist(), seed=0)
    torn = bootstrap_difference(generator.permutation(candidate).tolist(), baseline.tolist(), seed=0)
    assert verdict(paired) == "BETTER"
    assert verdict(torn) == "INCONCLUSIVE"
    assert torn.value == pytest.approx(paired.value)


def test_bootstrap_difference_covers_the_truth_about_as_often_as_it_says() -> None:
    generator = philox(21)
    trials, truth, covered = 500, 0.2, 0
    for trial in range(trials):
        # Skewed and discrete, as differences of right-or-wrong scores are: +1, 0, -1.
        differences = generator.choice([1.0, 0.0, -1.0], p=[0.35, 0.5, 0.15], size=48)
        interval = bootstrap_difference(differences.tolist(), [0.0] * 48, seed=trial, num_resamples=500)
        covered += interval.lower <= truth <= interval.upper
    assert 0.91 <= covered / trials <= 0.98


@pytest.mark.parametrize(
    ("candidate", "baseline", "message"),
    [([1.0], [], "1 candidates and 0 baselines"), ([], [], "at least one record")],
)
def test_bootstrap_difference_refuses_incomplete_pairs(
    candidate: list[float], baseline: list[float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        bootstrap_difference(candidate, baseline, seed=0)


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


def test_bootstrap_perplexity_difference_compares_on_the_same_resamples() -> None:
    generator = philox(2)
    tokens = generator.integers(5, 50, size=40)
    baseline = tokens * generator.uniform(1.0, 3.0, size=40)
    candidate = baseline - 0.05 * tokens
    counts = tokens.tolist()
    arms = (candidate.tolist(), counts), (baseline.tolist(), counts)
    difference = bootstrap_perplexity_difference(*arms, seed=0)
    alone = bootstrap_perplexity(*arms[1], seed=0)
    # Every resample of the candidate has exp(-0.05) times the perplexity of the baseline.
    factor = math.exp(-0.05) - 1
    assert difference.value == pytest.approx(factor * alone.value)
    assert difference.lower == pytest.approx(factor * alone.upper)
    assert difference.upper == pytest.approx(factor * alone.lower)
    assert verdict(difference, higher_is_better=False) == "BETTER"


def test_bootstrap_perplexity_difference_counts_the_tokens_of_each_side() -> None:
    """Arms that are asked with different templates have references of different lengths."""
    arms = ([4.0, 6.0], [4, 4]), ([4.0, 6.0], [5, 3])
    difference = bootstrap_perplexity_difference(*arms, seed=0)
    values = [bootstrap_perplexity(*arm, seed=0).value for arm in arms]
    assert difference.value == pytest.approx(values[0] - values[1])
    longer = bootstrap_perplexity_difference(([10.0, 10.0], [10, 10]), ([10.0, 10.0], [5, 5]), seed=0)
    assert longer.value == pytest.approx(math.exp(1) - math.exp(2))


def test_mcnemar_sums_the_binomial_exactly() -> None:
    for gained, lost, agreed in itertools.product(range(9), range(9), (0, 3)):
        candidate = [1.0] * gained + [0.0] * lost + [1.0] * agreed
        baseline = [0.0] * gained + [1.0] * lost + [1.0] * agreed
        tosses = gained + lost
        masses = [Fraction(math.comb(tosses, heads), 2**tosses) for heads in range(tosses + 1)]
        as_rare = sum((mass for mass in masses if mass <= masses[gained]), start=Fraction(0))
        assert mcnemar(candidate, baseline) == pytest.approx(float(as_rare)), (gained, lost)


def test_mcnemar_gives_the_known_value_for_nine_to_one() -> None:
    assert mcnemar([1.0] * 9 + [0.0], [0.0] * 9 + [1.0]) == 22 / 1024


def test_mcnemar_stays_exact_beyond_the_range_of_float() -> None:
    assert mcnemar([1.0] * 3000, [0.0] * 3000) == 0.0
    assert mcnemar([1.0, 0.0] * 2000, [0.0, 1.0] * 2000) == 1.0


@pytest.mark.parametrize(("candidate", "baseline"), [([0.5], [1.0]), ([1.0], [1.0, 0.0])])
def test_mcnemar_refuses_what_is_not_right_or_wrong(candidate: list[float], baseline: list[float]) -> None:
    with pytest.raises(ValueError, match="scores must be pairs of 0 and 1"):
        mcnemar(candidate, baseline)


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


def test_mcnemar_of_many_records_is_exact_and_quick() -> None:
    candidate = [1.0] * 26_000 + [0.0] * 24_000
    baseline = [0.0] * 26_000 + [1.0] * 24_000
    began = time.process_time()
    p_value = mcnemar(candidate, baseline)
    assert time.process_time() - began < 10
    # The normal approximation with continuity correction.
    z = (2_000 - 1) / math.sqrt(50_000)
    assert p_value == pytest.approx(math.erfc(z / math.sqrt(2)), rel=1e-3)
