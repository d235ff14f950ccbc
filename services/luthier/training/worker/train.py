"""Run TRAIN tasks: what a training needs is brought to it and what it makes is stored. Computes nothing itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import grpc

from luthier.errors import Reason, ResourceExhausted
from luthier.grading.outcomes import GradingError
from luthier.training.fitting import expected_words
from luthier.training.recipe_settings import rendering_names
from luthier.training.worker.order import Paused, RenderingRows, TrainEnd, TrainOrder, out_of_memory
from luthier.training.worker.places import places_of, rows_named
from luthier.training.worker.renderings import store_rows
from luthier.training.worker.whereabouts import pass_named
from luthier.v1 import fine_tuning_job_pb2, grader_pb2
from luthier.work.context import TaskContext, TaskPaused
from luthier.work.paced import Paced
from luthier.work.rewards import RewardAddresses, RewardError, scored
from luthier.worker.v1 import task_pb2

_READING = "reading rows"

Compute = Callable[[TrainOrder, "TaskDesk", TaskContext], TrainEnd]
"""Trains what an order says, at a desk, for as long as a task's context wants it."""


class Trainer:
    """Runs TRAIN tasks with the rows of one Data service."""

    def __init__(
        self, data_channel: grpc.Channel, compute: Compute, allowed: RewardAddresses | None = None
    ) -> None:
        self._data_channel = data_channel
        self._compute = compute
        self._allowed = allowed or RewardAddresses(())

    def __call__(self, context: TaskContext) -> task_pb2.TaskResult:
        """Train, from the task's checkpoint on if it has one.

        Raises:
            TaskCancelled: asked to stop; the last checkpoint stays.
            TaskPaused: asked to pause; the last checkpoint has all that was made.
            FailedPrecondition: LOSS_NOT_FINITE.
            ResourceExhausted: OUT_OF_MEMORY.
            Unavailable: CRASHED, STALLED or RANK_LOST, the processes that trained; TOO_FEW_RANKS.
            LuthierError: rows or files could not be read, or do not fit together.
        """
        job = context.task.train.job
        places = places_of(self._data_channel, lambda: context.token, context.check)
        renderings = rendering_names(job)
        with rows_named(places, renderings), pass_named(context.scratch, renderings):
            context.progress(_READING, 0, 0, "rows")
            order = TrainOrder(
                task=context.task, scratch=context.scratch, renderings=self._renderings(context)
            )
            desk = TaskDesk(context, self._allowed)
            try:
                with _sizes_named(job, desk):
                    made = self._compute(order, desk, context)
                if isinstance(made, Paused):
                    raise TaskPaused
                return task_pb2.TaskResult(train=made)
            finally:
                context.leave_checkpoint()

    def _renderings(self, context: TaskContext) -> tuple[RenderingRows, ...]:
        spec = context.task.train
        digests = [spec.rendering_digest, *spec.mixed_rendering_digests]
        read = _RowsRead(context)
        return tuple(
            store_rows(
                self._data_channel,
                lambda: context.token,
                name,
                digest,
                context.check,
                context.scratch / f"rows-{place}",
                read.add,
            )
            for place, (name, digest) in enumerate(zip(rendering_names(spec.job), digests, strict=True))
        )


class _RowsRead:
    """Tells now and then how many rows of a task have come, of all its renderings."""

    def __init__(self, context: TaskContext) -> None:
        self._context = context
        self._count = 0
        self._paced = Paced()

    def add(self, num_rows: int) -> None:
        self._count += num_rows
        if self._paced.due():
            self._context.progress(_READING, self._count, 0, "rows")


class TaskDesk:
    """A task's context as a training sees it: a `Desk`."""

    def __init__(self, context: TaskContext, allowed: RewardAddresses) -> None:
        self.task = context.task
        self.scratch = context.scratch
        self.check = context.check
        self.progress = context.progress
        self.metrics = context.metrics
        self.measured = context.measured
        self.log = context.log
        self.pausing = context.pausing
        self.fetch = context.fetch
        self.fetch_into = context.fetch_into
        self.begin_checkpoint = context.begin_checkpoint
        self.checkpoint_stored = context.checkpoint_stored
        self.commit_rollouts = context.commit_rollouts
        self.record = self.task.train.job.run_record
        """What was last kept of what runs."""
        self._context = context
        self._allowed = allowed

    def handed(self, step: int, paths: Sequence[Path]) -> list[Path]:
        """Return the files: whoever computes at this desk sees them where they are."""
        del step
        return list(paths)

    def run_record(self, record: fine_tuning_job_pb2.RunRecord) -> None:
        """Keep with the job what exactly runs; it is there when this returns."""
        self._context.run_record(record)
        self.record = record

    def scored(
        self, grader: grader_pb2.RemoteGrader, samples: Sequence[grader_pb2.Sample], most_errors: int
    ) -> list[float | GradingError]:
        """Return what a reward service says of each sample. Raises as `work.rewards.scored`."""
        found = scored(grader, samples, self._allowed, self._context.check, most_errors)
        return [
            GradingError(one.reason, one.message) if isinstance(one, RewardError) else one for one in found
        ]


@contextmanager
def _sizes_named(job: fine_tuning_job_pb2.FineTuningJob, desk: TaskDesk) -> Iterator[None]:
    """Say what a job takes its memory by where the kernel ended its process for want of it, which cannot say so."""
    try:
        yield
    except ResourceExhausted as error:
        # What names a device did not get as far as a step.
        if error.reason != Reason.OUT_OF_MEMORY or {"micro_batch_tokens", "device"} & set(error.metadata):
            raise
        record = desk.record
        expected = f"its passes {expected_words(record.memory)}" if record.HasField("memory") else ""
        raise out_of_memory(job, error.message, record.micro_batch_tokens, expected) from error
