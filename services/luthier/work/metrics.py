"""Prometheus metrics of the task queue."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from luthier.work.tasks import TaskKind, TaskState

_WAIT_BUCKETS = (0.01, 0.1, 0.5, 1, 5, 15, 60, 300, 900, 3600)


class WorkMetrics:
    """What operators watch of tasks, leases and workers."""

    def __init__(self, registry: CollectorRegistry, kinds: tuple[TaskKind, ...]) -> None:
        self._kinds = kinds
        self._tasks = Gauge("luthier_tasks", "Unfinished tasks.", ["kind", "state"], registry=registry)
        self.queue_wait_seconds = Histogram(
            "luthier_task_queue_wait_seconds",
            "Time from queueing a task to its claim.",
            ["kind"],
            buckets=_WAIT_BUCKETS,
            registry=registry,
        )
        self.attempts = Counter(
            "luthier_task_attempts", "Attempts that ended.", ["kind", "outcome"], registry=registry
        )
        self.leases_expired = Counter(
            "luthier_lease_expired", "Leases that ran out because their holder was silent.", registry=registry
        )
        self.set_aside = Counter(
            "luthier_task_set_aside", "Tasks failed because their claim fails.", ["kind"], registry=registry
        )
        self.workers = Gauge("luthier_workers", "Workers heard of within a lease period.", registry=registry)

    def show_counts(self, counts: Mapping[tuple[str, str], int]) -> None:
        """Set the number of unfinished tasks by (kind, state)."""
        for kind in self._kinds:
            for state in (TaskState.QUEUED, TaskState.LEASED):
                self._tasks.labels(kind.value, state.value).set(counts.get((kind.value, state.value), 0))
