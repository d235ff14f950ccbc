"""The steps of a training on a worker: each is told, checkpoints are stored, and after any of them it may pause."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from luthier.errors import FailedPrecondition, Reason
from luthier.training.recipes import checkpoint
from luthier.training.recipes.collective import Collective
from luthier.training.recipes.corpus import Corpus
from luthier.training.recipes.course import CheckpointDue, Course, StepDone, Warned
from luthier.training.recipes.engine import Engine
from luthier.training.recipes.loop import Settings
from luthier.training.recipes.rollouts import Rollouts
from luthier.training.worker.measuring import Measuring
from luthier.training.worker.methods import Loss, steps_of
from luthier.training.worker.order import Desk, Paused, TrainEnd
from luthier.training.worker.staging import Staging
from luthier.work.paced import Paced
from luthier.worker.v1 import task_pb2

ASK_SECONDS = 0.5
"""A rank of a cluster asks its driver through others, which takes longer than the steps of a small model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Begun:
    """A run before its next step.

    Attributes:
        engine: fresh, or from the task's checkpoint.
        course: likewise.
        changed: what has changed around the run.
        extra: files that each checkpoint has besides its own.
    """

    engine: Engine
    course: Course
    changed: list[str]
    extra: list[Path]


class Pauses:
    """Whether a run is to pause: the first rank asks its driver now and then, and all are told alike."""

    def __init__(
        self, desk: Desk, collective: Collective, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._desk = desk
        self._collective = collective
        self._clock = clock
        self._ask_at = clock()

    def now(self) -> bool:
        """Tell whether to pause where all ranks are."""
        return self._collective.of_first(self._asked)

    def _asked(self) -> bool:
        now = self._clock()
        if now < self._ask_at:
            return False
        self._ask_at = now + ASK_SECONDS
        return self._desk.pausing()


class FirstStep:
    """Before the first step of an attempt nobody knows how long one takes: now and then it says that it goes on."""

    def __init__(self, desk: Desk, step: int, num_steps: int) -> None:
        self._desk = desk
        self._step = step
        self._num_steps = num_steps
        self._paced: Paced | None = Paced()

    def check(self) -> None:
        """Go on, as the desk's `check` says."""
        self._desk.check()
        if self._paced is not None and self._paced.due():
            self._desk.progress("training", self._step, self._num_steps, "steps")

    def is_made(self) -> None:
        """Say no more of it: steps tell of themselves."""
        self._paced = None


def made_steps(
    desk: Desk,
    corpus: Corpus,
    settings: Settings,
    run: checkpoint.RunIdentity,
    begun: Begun,
    loss: Loss | None,
    rollouts: Rollouts | None,
) -> TrainEnd:
    """Make all steps that are left, telling of each and storing the checkpoints that are due.

    Where the job is to pause, the last one made is the last for now, and has a checkpoint when this returns.

    Raises:
        FailedPrecondition: NO_SUPERVISED_TOKENS, LOSS_NOT_FINITE and what else a recipe refuses.
        LuthierError: what the desk raised.
    """
    engine, course, num_steps = begun.engine, begun.course, settings.schedule.num_steps
    engine.mark.leave()
    measuring = Measuring(desk, engine.clock, engine.weights.model.device)
    desk.progress("training", course.step, num_steps, "steps")
    staging = Staging(desk, engine, run, begun.extra)
    pauses = Pauses(desk, engine.collective)
    if pauses.now():
        return _paused(desk, course)
    metrics: Mapping[str, float] = course.metrics
    first_step, began, step_seconds = course.step, time.monotonic(), 0.0
    first = FirstStep(desk, course.step, num_steps)
    for event in steps_of(loss, engine, corpus, settings, course, first.check, rollouts):
        engine.clock.enter("checkpoint" if isinstance(event, CheckpointDue) else "waiting")
        if isinstance(event, Warned):
            desk.log(event.text, "WARNING", step=event.step)
            continue
        course = event.course
        if isinstance(event, CheckpointDue):
            staging.take(course, step_seconds)
            continue
        metrics = event.metrics
        first.is_made()
        measuring.tell()
        step_seconds = (time.monotonic() - began) / (course.step - first_step)
        _tell(desk, event, num_steps, step_seconds * (num_steps - course.step))
        is_last = course.is_stopped or course.step == num_steps
        if not is_last and pauses.now():
            engine.clock.enter("checkpoint")
            engine.require_same_weights()
            staging.take(course, step_seconds)
            staging.stored()
            engine.mark.close()
            return _paused(desk, course)
    engine.mark.close()
    return _whole(desk, engine, course, metrics, staging, num_steps)


def _tell(desk: Desk, event: StepDone, num_steps: int, remaining_seconds: float) -> None:
    step = event.step
    desk.metrics(step, event.metrics)
    desk.progress("training", step, num_steps, "steps", remaining_seconds=remaining_seconds, step=step)


def _paused(desk: Desk, course: Course) -> Paused:
    desk.log(f"paused after step {course.step}", step=course.step)
    return Paused(step=course.step)


def _whole(
    desk: Desk,
    engine: Engine,
    course: Course,
    metrics: Mapping[str, float],
    staging: Staging,
    num_steps: int,
) -> task_pb2.TrainResult:
    """Return what a run made that has made all of its steps, or has ended early."""
    files = staging.stored()
    if course.is_stopped:
        desk.log(
            f"ended early: {course.stale_validations} validations since step {course.best_step} were not better"
        )
    elif course.step != num_steps or not files:
        raise FailedPrecondition(
            f"a run must make the {num_steps} steps of its plan and at least one, it made {course.step}",
            reason=Reason.NO_SUPERVISED_TOKENS,
        )
    return task_pb2.TrainResult(
        files=[file for file in files if file.path in engine.weights.result_files],
        step=course.step,
        metrics=metrics,
    )
