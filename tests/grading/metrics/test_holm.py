"""Holm's correction: error rate of a family, and intervals that say the same."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.grading.metrics.holm import ALPHA, corrected, shared
from luthier.grading.metrics.paired import binary_difference, real_difference


def test_it_gives_the_textbook_values() -> None:
    found = corrected([0.01, 0.04, 0.03, 0.005])
    assert [one.p_value for one in found] == pytest.approx([0.03, 0.06, 0.06, 0.02])
    # Two are called different at a quarter and a third of alpha, two are not, at half of it.
    assert [one.confidence for one in found] == pytest.approx(
        [1 - ALPHA / 3, 1 - ALPHA / 2, 1 - ALPHA / 2, 1 - ALPHA / 4]
    )
    assert corrected([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_a_confidence_goes_with_its_p_value(p_values: list[float]) -> None:
    for given_p, one in zip(p_values, corrected(p_values), strict=True):
        assert (one.p_value <= ALPHA) == (given_p <= 1 - one.confidence + 1e-15)
        assert one.p_value >= given_p
        assert one.confidence >= 1 - ALPHA - 1e-15


def test_of_thirty_three_comparisons_without_a_difference_few_families_call_one() -> None:
    """Uncorrected, half of such families do."""
    generator = np.random.Generator(np.random.Philox(11))
    wrong = raw = 0
    for _ in range(300):
        p_values = [
            binary_difference(*generator.integers(0, 2, (2, 48)).astype(float)).p_value for _ in range(33)
        ]
        raw += min(p_values) <= ALPHA
        wrong += min(one.p_value for one in corrected(p_values)) <= ALPHA
    assert wrong / 300 <= ALPHA + 0.025
    assert raw / 300 > 0.5


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_a_shared_confidence_goes_with_its_p_value_and_is_never_below_holms(p_values: list[float]) -> None:
    for given_p, one, by_holm in zip(p_values, shared(p_values), corrected(p_values), strict=True):
        assert (one.p_value <= ALPHA) == (given_p <= ALPHA / len(p_values))
        assert one.confidence == pytest.approx(1 - ALPHA / len(p_values))
        assert one.p_value >= by_holm.p_value
    assert shared([]) == []


def test_intervals_that_share_the_error_hold_their_truths_together_and_those_of_holm_do_not() -> None:
    """Five differences that are all there: Holm calls each, and the last of its intervals has 95 % for itself."""
    generator = np.random.Generator(np.random.Philox(12))
    missed = {"shared": 0, "holm": 0}
    for _ in range(1000):
        found = [real_difference(generator.normal(2, 1, 24).tolist(), [0.0] * 24) for _ in range(5)]
        p_values = [one.p_value for one in found]
        for name, levels in (("shared", shared(p_values)), ("holm", corrected(p_values))):
            intervals = [one.interval(level.confidence) for one, level in zip(found, levels, strict=True)]
            missed[name] += not all(one.lower <= 2 <= one.upper for one in intervals)
    assert missed["shared"] / 1000 <= ALPHA + 0.02
    assert missed["holm"] / 1000 > ALPHA + 0.03
