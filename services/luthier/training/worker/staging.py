"""Checkpoints that are stored while training goes on, each from a copy in files of its own."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from luthier.training.recipes import checkpoint
from luthier.training.recipes.course import Course
from luthier.training.recipes.engine import Engine
from luthier.training.worker.order import Desk
from luthier.worker.v1 import task_pb2


class Staging:
    """Takes a run's checkpoints: a step waits until one is written into files here, and not until it is stored.

    There is one copy at a time, so that the next checkpoint waits for the one before it.

    Args:
        desk: stores them.
        engine: trains.
        run: what each is a checkpoint of.
        extra: files that each has besides its own.
    """

    def __init__(
        self, desk: Desk, engine: Engine, run: checkpoint.RunIdentity, extra: Sequence[Path]
    ) -> None:
        self._desk = desk
        self._engine = engine
        self._run = run
        self._extra = extra
        self._folder: Path | None = None
        self._files: Sequence[task_pb2.BlobFile] = list(desk.task.train.checkpoint_files)

    def take(self, course: Course) -> None:
        """Copy where a run stands, and begin to store that."""
        self.stored()
        folder = self._desk.scratch / f"step-{course.step}"
        paths = self._desk.handed(course.step, checkpoint.save(folder, self._engine, course, self._run))
        if self._engine.weights.keeps_parts:
            # The checkpoint begins when every rank has written its files.
            paths = [path for part in self._engine.collective.gathered(paths) for path in part]
        self._desk.begin_checkpoint(course.step, [*paths, *self._extra], course.metrics)
        self._folder = folder

    def stored(self) -> Sequence[task_pb2.BlobFile]:
        """Return the files of the last checkpoint, that before this attempt included, once the service has them."""
        if self._folder is not None:
            self._files = self._desk.checkpoint_stored()
            # Of several ranks the first one alone has written, unless each has parts.
            if self._folder.exists():
                shutil.rmtree(self._folder)
            self._folder = None
        return self._files
