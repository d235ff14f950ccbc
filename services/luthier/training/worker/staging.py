"""Checkpoints that are stored while training goes on, each from a copy in files of its own."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from luthier.training.recipes import checkpoint
from luthier.training.recipes.course import Course
from luthier.training.recipes.engine import Engine
from luthier.training.worker.order import Desk
from luthier.worker.v1 import task_pb2

_LITTLE_SECONDS = 1.0
"""Steps of a tiny model are shorter than storing anything: nobody minds so short a wait."""


class Staging:
    """Takes a run's checkpoints: a step waits until one is written into files here, and not until it is stored.

    There is one copy at a time, so that the next checkpoint waits for the one before it, for as long as that takes: one
    that is left out may be the best, or the one that a pause needs. Who waits longer than a step is told so, once.

    Args:
        desk: stores them.
        engine: trains.
        run: what each is a checkpoint of.
        extra: files that each has besides its own.
        clock: of seconds.
    """

    def __init__(
        self,
        desk: Desk,
        engine: Engine,
        run: checkpoint.RunIdentity,
        extra: Sequence[Path],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._desk = desk
        self._engine = engine
        self._run = run
        self._extra = extra
        self._clock = clock
        self._has_warned = False
        self._folder: Path | None = None
        self._files: Sequence[task_pb2.BlobFile] = list(desk.task.train.checkpoint_files)

    def take(self, course: Course, step_seconds: float = 0.0) -> None:
        """Copy where a run stands, and begin to store that. Its steps take `step_seconds`."""
        began = self._clock()
        self.stored()
        self._warn(course, self._clock() - began, step_seconds)
        folder = self._desk.scratch / f"step-{course.step}"
        paths = self._desk.handed(course.step, checkpoint.save(folder, self._engine, course, self._run))
        if self._engine.weights.keeps_parts:
            # The checkpoint begins when every rank has written its files.
            paths = [path for part in self._engine.collective.gathered(paths) for path in part]
        self._desk.begin_checkpoint(course.step, [*paths, *self._extra], course.metrics)
        self._folder = folder

    def _warn(self, course: Course, seconds: float, step_seconds: float) -> None:
        if self._has_warned or seconds <= max(step_seconds, _LITTLE_SECONDS):
            return
        self._has_warned = True
        text = (
            f"waited {seconds:.1f} s, longer than a step takes, until the checkpoint before was stored: checkpoints "
            "come faster than they are stored; raise checkpoint_interval_steps"
        )
        self._desk.log(text, "WARNING", step=course.step)

    def stored(self) -> Sequence[task_pb2.BlobFile]:
        """Return the files of the last checkpoint, that before this attempt included, once the service has them."""
        if self._folder is not None:
            self._files = self._desk.checkpoint_stored()
            # Of several ranks the first one alone has written, unless each has parts.
            if self._folder.exists():
                shutil.rmtree(self._folder)
            self._folder = None
        return self._files
