"""The score test of two paired shares: McNemar's statistic at zero, and the likeliest shares elsewhere."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize, stats

from luthier.grading.metrics.paired_binary import bounds, deviation, p_values


@given(gained=st.integers(0, 40), lost=st.integers(0, 40), agreed=st.integers(2, 40))
def test_at_zero_it_is_mcnemars_statistic(gained: int, lost: int, agreed: int) -> None:
    count = gained + lost + agreed
    squared = (gained - lost) ** 2 / (gained + lost) * (count - 1) / count if gained + lost else 0.0
    assert deviation(gained, lost, count) ** 2 == pytest.approx(squared)
    assert p_values(gained, lost, count) == pytest.approx(stats.chi2.sf(squared, 1))


def test_the_variance_is_that_of_the_likeliest_shares() -> None:
    """The share that the quadratic gives is what a search over all shares finds."""
    gained, lost, count, null = 9, 3, 30, 0.1

    def unlikelihood(share: float) -> float:
        shares = np.array([share + null, share, 1 - 2 * share - null])
        return -float((np.array([gained, lost, count - gained - lost]) * np.log(shares)).sum())

    share = optimize.minimize_scalar(unlikelihood, bounds=(1e-9, (1 - null) / 2 - 1e-9), method="bounded").x
    variance = count * (2 * share + null * (1 - null)) * count / (count - 1)
    wanted = (gained - lost - count * null) / np.sqrt(variance)
    assert deviation(gained, lost, count, null) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("count", [12, 50, 1000])
def test_without_a_discordant_record_the_interval_is_known(count: int) -> None:
    """All shares that none of `count` records would show: count * x / (1 - x) is the square of the quantile."""
    squared = stats.norm.ppf(0.975) ** 2 * count / (count - 1)
    wanted = squared / (count + squared)
    assert np.array(bounds(0, 0, count, 0.95)) == pytest.approx([-wanted, wanted], abs=1e-9)


@given(gained=st.integers(0, 30), lost=st.integers(0, 30), agreed=st.integers(0, 30))
def test_a_bound_is_where_the_p_value_is_alpha(gained: int, lost: int, agreed: int) -> None:
    count = max(2, gained + lost + agreed)
    for bound in bounds(gained, lost, count, 0.95):
        assert abs(bound) == 1.0 or p_values(gained, lost, count, bound) == pytest.approx(0.05, abs=1e-6)


def test_many_data_sets_are_tested_at_once() -> None:
    gained, lost = np.array([0, 5, 9]), np.array([0, 1, 9])
    lower, upper = bounds(gained, lost, 20, 0.9)
    for index in range(3):
        alone = bounds(gained[index], lost[index], 20, 0.9)
        assert np.array(alone) == pytest.approx([lower[index], upper[index]], abs=1e-12)
