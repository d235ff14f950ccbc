from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.grading.metrics.intervals import Interval, verdict, wilson


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
