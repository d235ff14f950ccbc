"""The learning rate by step."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.training.recipes.schedule import RateCourse, Schedule, steps_of_ratio


def schedule(course: RateCourse, warmup_steps: int = 0, num_steps: int = 10) -> Schedule:
    return Schedule(peak=0.1, course=course, warmup_steps=warmup_steps, num_steps=num_steps)


def test_learning_rate_constant_stays_at_its_peak() -> None:
    assert {schedule(RateCourse.CONSTANT).learning_rate(step) for step in range(1, 11)} == {0.1}


def test_learning_rate_linear_falls_by_the_same_amount_each_step() -> None:
    rates = [schedule(RateCourse.LINEAR).learning_rate(step) for step in range(1, 11)]
    assert rates == pytest.approx([0.1, 0.09, 0.08, 0.07, 0.06, 0.05, 0.04, 0.03, 0.02, 0.01])


def test_learning_rate_cosine_is_half_the_peak_in_the_middle() -> None:
    assert schedule(RateCourse.COSINE).learning_rate(6) == pytest.approx(0.05)
    assert schedule(RateCourse.COSINE).learning_rate(10) == pytest.approx(
        0.05 * (1 + math.cos(0.9 * math.pi))
    )


def test_learning_rate_rises_in_equal_parts_to_the_peak_after_warm_up() -> None:
    rates = [schedule(RateCourse.LINEAR, warmup_steps=3).learning_rate(step) for step in range(1, 6)]
    assert rates == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1 * 6 / 7])


def test_learning_rate_warmup_stable_decay_falls_over_the_last_steps_alone() -> None:
    wanted = Schedule(
        peak=0.1, course=RateCourse.WARMUP_STABLE_DECAY, warmup_steps=2, num_steps=10, decay_steps=3
    )
    rates = [wanted.learning_rate(step) for step in range(1, 11)]
    assert rates == pytest.approx([0.1 / 3, 0.2 / 3, 0.1, 0.1, 0.1, 0.1, 0.1, 0.075, 0.05, 0.025])


@given(num_steps=st.integers(1, 40), warmup_steps=st.integers(0, 40), decay_steps=st.integers(0, 60))
def test_learning_rate_warmup_stable_decay_is_never_zero_nor_above_the_peak(
    num_steps: int, warmup_steps: int, decay_steps: int
) -> None:
    wanted = Schedule(
        peak=0.1,
        course=RateCourse.WARMUP_STABLE_DECAY,
        warmup_steps=warmup_steps,
        num_steps=num_steps,
        decay_steps=decay_steps,
    )
    assert all(0 < wanted.learning_rate(step) <= 0.1 for step in range(1, num_steps + 1))


@pytest.mark.parametrize(
    ("ratio", "num_steps", "steps"),
    [(0.1, 100, 10), (0.07, 100, 7), (0.03, 50, 2), (0.0, 50, 0), (1.0, 7, 7), (0.5, 1, 1), (1 / 3, 9, 3)],
)
def test_steps_of_ratio_rounds_up_and_takes_no_remainder_for_a_step(
    ratio: float, num_steps: int, steps: int
) -> None:
    assert steps_of_ratio(ratio, num_steps) == steps


@given(
    course=st.sampled_from(list(RateCourse)), num_steps=st.integers(1, 50), warmup_steps=st.integers(0, 60)
)
def test_learning_rate_is_never_zero_nor_above_the_peak(
    course: RateCourse, num_steps: int, warmup_steps: int
) -> None:
    rates = [schedule(course, warmup_steps, num_steps).learning_rate(n) for n in range(1, num_steps + 1)]
    assert all(0 < rate <= 0.1 for rate in rates)
