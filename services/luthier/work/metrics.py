"""Prometheus metrics of the task queue, and who else hears what becomes of tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from prometheus_client import CollectorRegistry, Histogram

from luthier.errors import Failure, Reason
from luthier.runtime.catalogue import queue, work_done, workers
from luthier.runtime.metric import NONE, Metric, Shown, reason_label
from luthier.v1.event_pb2 import Event
from luthier.work.faults import SERVICE_FAULTS
from luthier.work.tasks import Outcome, Task, TaskKind
from luthier.worker.v1.worker_service_pb2 import CommitCheckpointRequest, TaskFigures

SHOWN_OF_WORKERS: tuple[Metric, ...] = tuple(
    metric for metric in vars(workers).values() if isinstance(metric, Metric) and metric is not workers.UP
)
"""What is known of each worker, or of all by kind, and shown anew as a whole."""


class TaskObserver(Protocol):
    """Hears what becomes of the tasks of its service, once it is stored. Must be quick, and must not raise."""

    def began(self, task: Task) -> None:
        """A worker was given the task: an attempt begins."""
        ...

    def reported(self, task: Task, events: Sequence[Event], figures: TaskFigures | None) -> None:
        """A worker reported events that are new, and what it measured of its work."""
        ...

    def checkpointed(self, task: Task, request: CommitCheckpointRequest) -> None:
        """A checkpoint was committed."""
        ...

    def ended(self, task: Task, outcome: Outcome | None) -> None:
        """A task is over; None: an attempt is, and its task is queued again or paused."""
        ...


class WorkMetrics:
    """What operators watch of tasks, leases and workers.

    Attributes:
        observers: hear what becomes of tasks.
    """

    def __init__(self, registry: CollectorRegistry, kinds: tuple[TaskKind, ...]) -> None:
        self.kinds = kinds
        self.observers: list[TaskObserver] = [Checkpoints(registry, kinds)]
        self.shown = Shown(registry, queue.TASKS, queue.OLDEST, queue.WAITING, *SHOWN_OF_WORKERS)
        self._queue_wait_seconds = queue.QUEUE_WAIT.histogram(registry)
        self.leases_expired = queue.LEASES_EXPIRED.counter(registry)
        self.set_aside = queue.SET_ASIDE.counter(registry)
        self.workers = workers.UP.gauge(registry)
        self._attempts = queue.ATTEMPTS.counter(registry)
        self._ended = queue.ENDED.counter(registry)
        for kind in kinds:
            self._attempts.labels(kind.value, "succeeded", NONE)
            self._ended.labels(kind.value, "succeeded", NONE, NONE)
            self.set_aside.labels(kind.value)
            # Alerts ask by how much these rise: of a series that begins with its first failure nobody could tell.
            for reason in SERVICE_FAULTS:
                self._ended.labels(kind.value, "failed", "service", str(reason))
        if TaskKind.TRAIN in kinds:
            for reason in (Reason.LOSS_NOT_FINITE, Reason.OUT_OF_MEMORY):
                self._ended.labels(TaskKind.TRAIN.value, "failed", "request", str(reason))

    def attempt_began(self, task: Task, waited_seconds: float) -> None:
        """Count an attempt that begins after so long a wait, and say so to whoever listens."""
        self._queue_wait_seconds.labels(task.kind.value).observe(waited_seconds)
        for observer in self.observers:
            observer.began(task)

    def attempt_ended(self, task: Task, outcome: str, reason: str) -> None:
        """Count an attempt that is over: succeeded, failed, cancelled, paused or lost."""
        self._attempts.labels(task.kind.value, outcome, reason_label(reason)).inc()

    def task_ended(self, task: Task, outcome: Outcome) -> None:
        """Count a task that is over for good, and say so to whoever listens."""
        word, reason = "succeeded", ""
        if outcome.failure is not None:
            word, reason = "failed", outcome.failure.reason
        elif outcome.cancelled:
            word = "cancelled"
        self._ended.labels(task.kind.value, word, fault_of(outcome.failure), reason_label(reason)).inc()
        for observer in self.observers:
            observer.ended(task, outcome)

    def task_left(self, task: Task) -> None:
        """Say that an attempt is over and its task is not: it is queued again, or paused."""
        for observer in self.observers:
            observer.ended(task, None)

    def reported(self, task: Task, events: Sequence[Event], figures: TaskFigures | None) -> None:
        """Say what a worker reported that is new."""
        for observer in self.observers:
            observer.reported(task, events, figures)

    def checkpointed(self, task: Task, request: CommitCheckpointRequest) -> None:
        """Say that a checkpoint was committed."""
        for observer in self.observers:
            observer.checkpointed(task, request)


def fault_of(failure: Failure | None) -> str:
    """Return whose fault it is that a task failed: the service's, or that of what was asked for (request)."""
    if failure is None:
        return NONE
    return "service" if failure.reason in SERVICE_FAULTS else "request"


class Checkpoints:
    """Sizes and times of checkpoints: an observer."""

    def __init__(self, registry: CollectorRegistry, kinds: tuple[TaskKind, ...]) -> None:
        kept = [kind.value for kind in kinds if kind in (TaskKind.TRAIN, TaskKind.EVALUATE)]
        self._series: dict[str, tuple[Histogram, Histogram]] = {}
        # A service whose tasks keep none has no such metrics.
        if kept:
            seconds = work_done.CHECKPOINT_SECONDS.histogram(registry)
            sizes = work_done.CHECKPOINT_BYTES.histogram(registry)
            self._series = {kind: (seconds.labels(kind), sizes.labels(kind)) for kind in kept}

    def began(self, task: Task) -> None:
        """Nothing is to be noted."""

    def reported(self, task: Task, events: Sequence[Event], figures: TaskFigures | None) -> None:
        """Nothing is to be noted."""

    def checkpointed(self, task: Task, request: CommitCheckpointRequest) -> None:
        """Note how large it is, and how long it took where the worker says so."""
        if task.kind.value not in self._series:
            return
        seconds, sizes = self._series[task.kind.value]
        sizes.observe(sum(file.size_bytes for file in request.files))
        if request.seconds:
            seconds.observe(request.seconds)

    def ended(self, task: Task, outcome: Outcome | None) -> None:
        """Nothing is to be noted."""
