"""A checkpoint that waits long for the one before it says so, once, and is taken all the same."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from luthier.training.recipes import checkpoint
from luthier.training.recipes.course import Course
from luthier.training.worker.staging import Staging


class Clock:
    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now


class SlowDesk:
    """Takes so many seconds to store a checkpoint."""

    def __init__(self, scratch: Path, clock: Clock, seconds: float) -> None:
        self.task = SimpleNamespace(train=SimpleNamespace(checkpoint_files=[]))
        self.scratch = scratch
        self.begun: list[int] = []
        self.said: list[tuple[str, str, int]] = []
        self._clock = clock
        self._seconds = seconds

    def handed(self, step: int, paths: list[Path]) -> list[Path]:
        del step
        return paths

    def begin_checkpoint(self, step: int, paths: list[Path], metrics: object) -> None:
        del paths, metrics
        self.begun.append(step)

    def checkpoint_stored(self) -> list[Any]:
        self._clock.now += self._seconds
        return []

    def log(self, text: str, severity: str = "INFO", step: int = 0) -> None:
        self.said.append((text, severity, step))


@pytest.fixture
def saved(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps whose weights were copied."""
    steps: list[int] = []

    def save(folder: Path, engine: object, course: Course, run: object) -> list[Path]:
        del folder, engine, run
        steps.append(course.step)
        return []

    monkeypatch.setattr(checkpoint, "save", save)
    return steps


def taken(tmp_path: Path, storing_seconds: float, step_seconds: float) -> SlowDesk:
    """A desk after checkpoints of three steps in a row."""
    clock = Clock()
    desk = SlowDesk(tmp_path, clock, storing_seconds)
    engine: Any = SimpleNamespace(weights=SimpleNamespace(keeps_parts=False))
    made: Any = desk
    run: Any = None
    staging = Staging(made, engine, run, [], clock)
    for step in (1, 2, 3):
        staging.take(Course(step=step), step_seconds)
    return desk


def test_a_long_wait_is_told_once_and_leaves_no_checkpoint_out(tmp_path: Path, saved: list[int]) -> None:
    desk = taken(tmp_path, storing_seconds=30.0, step_seconds=10.0)
    assert desk.begun == saved == [1, 2, 3]
    ((text, severity, step),) = desk.said
    assert (severity, step) == ("WARNING", 2)
    assert "waited 30.0 s" in text
    assert "raise checkpoint_interval_steps" in text


@pytest.mark.parametrize(("storing_seconds", "step_seconds"), [(5.0, 10.0), (0.5, 0.01)])
def test_a_wait_of_a_step_or_of_next_to_nothing_is_not_told(
    tmp_path: Path, saved: list[int], storing_seconds: float, step_seconds: float
) -> None:
    desk = taken(tmp_path, storing_seconds, step_seconds)
    assert desk.begun == saved == [1, 2, 3]
    assert desk.said == []
