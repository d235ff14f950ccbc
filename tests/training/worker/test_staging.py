"""How long a loop waits for checkpoints, counted in its own steps; a long wait is told once, and leaves none out."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.training.worker.conftest import Site

from luthier.training.recipes import checkpoint
from luthier.training.recipes.course import Course
from luthier.training.worker.staging import Staging
from luthier.v1.fine_tuning_job_pb2 import FineTuningJob
from luthier.work.context import TaskContext
from luthier.work.session import TaskSession

INTERVAL = 3
"""Steps from one checkpoint to the next."""


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


class DeskOfSteps(SlowDesk):
    """Takes so many steps of the loop to store a checkpoint; the clock counts steps."""

    def begin_checkpoint(self, step: int, paths: list[Path], metrics: object) -> None:
        super().begin_checkpoint(step, paths, metrics)
        self._stored_at = self._clock.now + self._seconds

    def checkpoint_stored(self) -> list[Any]:
        self._clock.now = max(self._clock.now, self._stored_at)
        return []


@pytest.mark.parametrize(("storing_steps", "most_waited"), [(0, 0), (INTERVAL, 0), (INTERVAL + 1, 1)])
def test_a_loop_waits_for_what_storing_takes_longer_than_to_the_next_checkpoint(
    tmp_path: Path, saved: list[int], storing_steps: int, most_waited: int
) -> None:
    clock = Clock()
    desk: Any = DeskOfSteps(tmp_path, clock, storing_steps)
    engine: Any = SimpleNamespace(weights=SimpleNamespace(keeps_parts=False))
    run: Any = None
    staging = Staging(desk, engine, run, [], clock)
    waited = []
    for step in range(1, 5 * INTERVAL + 1):
        clock.now += 1
        before = clock.now
        if step % INTERVAL == 0:
            staging.take(Course(step=step), 1.0)
        waited.append(clock.now - before)
    assert saved == [3, 6, 9, 12, 15]
    assert max(waited) == most_waited


async def test_a_job_makes_all_steps_to_the_next_checkpoint_while_one_is_stored(
    site: Site, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each checkpoint is stored only when the next is due: a loop that waited before would make no step more."""
    num_steps = 3 * INTERVAL
    reached, moved = [0], threading.Condition()
    asked: list[int] = []
    held: list[tuple[int, int]] = []
    report, commit, stored = TaskContext.metrics, TaskSession.commit_checkpoint, TaskContext.checkpoint_stored

    def metrics(context: TaskContext, step: int, values: Mapping[str, float]) -> None:
        report(context, step, values)
        with moved:
            reached[0] = step
            moved.notify_all()

    def wait_for(step: int) -> None:
        with moved:
            assert moved.wait_for(lambda: reached[0] >= step, timeout=300), f"no step {step} came"

    async def commit_late(session: TaskSession, step: int, *others: Any) -> str:
        await asyncio.to_thread(wait_for, min(step + INTERVAL, num_steps))
        held.append((step, reached[0]))
        return await commit(session, step, *others)

    def checkpoint_stored(context: TaskContext, *arguments: Any) -> Any:
        asked.append(reached[0])
        return stored(context, *arguments)

    monkeypatch.setattr(TaskContext, "metrics", metrics)
    monkeypatch.setattr(TaskSession, "commit_checkpoint", commit_late)
    monkeypatch.setattr(TaskContext, "checkpoint_stored", checkpoint_stored)
    async with site.worker():
        site.data.tokenizer_digest = (await site.register(model_folder)).tokenizer_digest
        job = await site.create("slow", max_steps=num_steps)
        ended = await site.ended(job.name)
    assert ended.state == FineTuningJob.STATE_SUCCEEDED, ended.error
    assert held == [(3, 6), (6, 9), (9, 9)]
    assert asked == [6, 9, 9], "before the next checkpoint, and at the end, and never between"
