"""What a training measures of itself is told now and then, and costs a step nothing."""

from __future__ import annotations

import time
from typing import Any

import torch

from luthier.training.recipes.phases import PhaseClock
from luthier.training.worker.measuring import Measuring
from luthier.worker.v1.worker_service_pb2 import TaskFigures


class Desk:
    def __init__(self) -> None:
        self.told: list[TaskFigures] = []
        self.measured = self.told.append


def measuring(desk: Any) -> tuple[Measuring, PhaseClock]:
    clock = PhaseClock()
    return Measuring(desk, clock, torch.device("cpu")), clock


def test_figures_say_where_time_went_what_is_held_and_how_busy_it_was() -> None:
    desk = Desk()
    made, clock = measuring(desk)
    clock.enter("compute")
    until = time.process_time() + 0.05
    while time.process_time() < until:
        pass
    made.tell()
    (figures,) = desk.told
    assert set(figures.phase_seconds) == {"compute"}
    assert figures.phase_seconds["compute"] >= 0.05
    assert figures.peak_memory_bytes > 100 << 20, "torch alone takes more"
    assert 0.0 < figures.device_use <= 1.0


def test_idle_time_is_no_use_of_the_device() -> None:
    desk = Desk()
    made, _ = measuring(desk)
    made.tell()
    time.sleep(0.2)
    made._told_at = float("-inf")
    made.tell()
    assert desk.told[1].device_use < 0.5


def test_steps_that_are_quick_tell_once_a_second() -> None:
    desk = Desk()
    made, _ = measuring(desk)
    began = time.perf_counter()
    for _ in range(10_000):
        made.tell()
    seconds = time.perf_counter() - began
    assert len(desk.told) <= 1 + seconds
    assert seconds / 10_000 < 1e-4
