"""When a run asks whether it is to pause, that all of its ranks hear the same, and what its first step says."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
from tests.training.worker.test_ranks import RankOfThreads, Round

from luthier.training.recipes.collective import OneRank
from luthier.training.worker import steps
from luthier.training.worker.steps import ASK_SECONDS, FirstStep, Pauses
from luthier.work.paced import REPORT_SECONDS, Paced


class Driver:
    """Counts how often it is asked, and wants a pause from a certain time on."""

    def __init__(self) -> None:
        self.num_asked = 0
        self.wants = False

    def pausing(self) -> bool:
        self.num_asked += 1
        return self.wants


class Clock:
    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now


def test_pauses_asks_at_once_and_then_now_and_then() -> None:
    driver, clock = Driver(), Clock()
    pauses = Pauses(driver, OneRank(), clock)  # type: ignore[arg-type]  # asked for nothing else
    for _ in range(100):
        assert not pauses.now()
        clock.now += ASK_SECONDS / 20
    assert driver.num_asked == 5
    driver.wants = True
    clock.now += ASK_SECONDS
    assert pauses.now()


def test_pauses_tells_all_ranks_what_the_first_hears() -> None:
    shared = Round()

    def run(rank: int) -> tuple[list[bool], int]:
        driver: Any = Driver()
        pauses, clock = Pauses(driver, RankOfThreads(shared, rank), clock_of := Clock()), clock_of
        found = []
        for number in range(6):
            driver.wants = rank == 0 and number >= 3
            found.append(pauses.now())
            clock.now += ASK_SECONDS
        return found, driver.num_asked

    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(run, (0, 1))
    assert first == ([False] * 3 + [True] * 3, 6)
    assert second == ([False] * 3 + [True] * 3, 0), "it asks nobody"


class Listener:
    """Counts signs of life, and notes what is told."""

    def __init__(self) -> None:
        self.num_checks = 0
        self.told: list[tuple[str, int, int, str]] = []

    def check(self) -> None:
        self.num_checks += 1

    def progress(self, *told: Any) -> None:
        self.told.append(told)


def test_a_long_first_step_says_now_and_then_that_it_goes_on_and_later_ones_do_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    desk, clock = Listener(), Clock()
    monkeypatch.setattr(steps, "Paced", partial(Paced, clock=clock))
    made: Any = desk
    first = FirstStep(made, 4, 9)
    for _ in range(100):
        first.check()
        clock.now += REPORT_SECONDS / 20
    assert desk.told == [("training", 4, 9, "steps")] * 4
    first.is_made()
    for _ in range(100):
        first.check()
        clock.now += REPORT_SECONDS
    assert len(desk.told) == 4
    assert desk.num_checks == 200
