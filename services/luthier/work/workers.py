"""Workers that made themselves known to this process, and which of them are heard of."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from luthier.errors import AlreadyExists, FailedPrecondition, Reason
from luthier.work.metrics import WorkMetrics
from luthier.work.requirements import Equipment
from luthier.work.tasks import TaskKind
from luthier.worker.v1.worker_service_pb2 import WorkerFigures


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """A registered worker; `instance` tells its processes apart, `lock` names what it alone holds, if anything.

    `equipment` is what it computes with, `version` that of its code.
    """

    worker_id: str
    instance: str
    kinds: tuple[TaskKind, ...]
    lock: str = ""
    equipment: Equipment = field(default_factory=Equipment)
    version: str = ""

    @property
    def holder(self) -> str:
        """Name under which it holds leases."""
        return (
            f"{self.worker_id}@{self.lock}/{self.instance}"
            if self.lock
            else f"{self.worker_id}@{self.instance}"
        )


def holder_parts(holder: str) -> tuple[str, str, str]:
    """Take a holder's name apart: worker id, lock (empty if it has none), instance."""
    worker_id, _, process = holder.partition("@")
    lock, _, instance = process.rpartition("/")
    return worker_id, lock, instance


class Workers:
    """Registered workers by id. Kept in memory: after a restart of the service workers register again.

    A worker counts for `period_seconds` after it was last heard of, and while it waits for a task.
    """

    def __init__(
        self, metrics: WorkMetrics, period_seconds: float = 30.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._metrics = metrics
        self._period_seconds = period_seconds
        self._clock = clock
        self._workers: dict[str, Worker] = {}
        self._heard: dict[str, float] = {}
        self._waiting: dict[str, int] = {}
        self._figures: dict[str, WorkerFigures] = {}

    def register(self, worker: Worker, leases: Mapping[str, float] | None = None) -> None:
        """Make a worker known, in place of its former process if that one is gone.

        A former process is gone when it was silent for a full period, or when this one holds the lock that it
        held. `leases`: seconds left by holder, of leases of this worker id that this process may not have
        seen the holder of.

        Raises:
            AlreadyExists: WORKER_ID_TAKEN; another process may be alive.
        """
        left = dict(leases or {})
        former = self._workers.get(worker.worker_id)
        if former is not None:
            left[former.holder] = max(left.get(former.holder, 0.0), self._remaining_seconds(former.worker_id))
        for holder, seconds in left.items():
            _, lock, instance = holder_parts(holder)
            if instance != worker.instance and seconds > 0 and not (lock and lock == worker.lock):
                raise _taken(worker.worker_id, seconds)
        self._workers[worker.worker_id] = worker
        if former is None or former.instance != worker.instance:
            self._figures.pop(worker.worker_id, None)
        self.heard(worker.holder)
        self.show()

    def known(self, worker_id: str, instance: str = "") -> Worker:
        """Return a registered worker; with `instance`, only if it is that process.

        Raises:
            FailedPrecondition: it did not register with this process, or another process of its id did.
        """
        worker = self._workers.get(worker_id)
        if worker is None or (instance and instance != worker.instance):
            who = "is not registered here" if worker is None else "is registered by another process"
            raise FailedPrecondition(
                reason=Reason.WRONG_STATE,
                message=f"worker {worker_id!r} {who}; call RegisterWorker first",
                metadata={"worker": worker_id},
            )
        return worker

    def heard(self, holder: str) -> None:
        """Note that a worker spoke; one that is not the registered process of its id does not count."""
        worker_id = holder_parts(holder)[0]
        worker = self._workers.get(worker_id)
        if worker is not None and worker.holder == holder:
            self._heard[worker_id] = self._clock()

    def measured(self, holder: str, figures: WorkerFigures) -> None:
        """Keep what a worker measured of itself; one that is not the registered process of its id does not count."""
        worker = self._workers.get(holder_parts(holder)[0])
        if worker is not None and worker.holder == holder:
            self._figures[worker.worker_id] = figures

    def figures(self, worker_id: str) -> WorkerFigures | None:
        """Return what a worker measured of itself last; None: it never said."""
        return self._figures.get(worker_id)

    @contextmanager
    def waiting(self, worker: Worker) -> Iterator[None]:
        """Count a worker as heard of for the length of a block, in which it waits for an answer."""
        self.heard(worker.holder)  # not when the wait ends: by then nobody may be at the other end
        self._waiting[worker.holder] = self._waiting.get(worker.holder, 0) + 1
        try:
            yield
        finally:
            self._waiting[worker.holder] -= 1
            if not self._waiting[worker.holder]:
                del self._waiting[worker.holder]

    def excuse(self) -> None:
        """Give every worker a full period: the silence was this process's own."""
        self._heard = dict.fromkeys(self._heard, self._clock())

    def present(self) -> list[Worker]:
        """Return those that are heard of."""
        return [worker for worker in self._workers.values() if self._remaining_seconds(worker.worker_id) > 0]

    def show(self) -> None:
        """Show in the metrics how many are heard of."""
        self._metrics.workers.set(len(self.present()))

    def _remaining_seconds(self, worker_id: str) -> float:
        if self._waiting.get(self._workers[worker_id].holder):
            return self._period_seconds
        return max(0.0, self._heard[worker_id] + self._period_seconds - self._clock())


def _taken(worker_id: str, seconds: float) -> AlreadyExists:
    return AlreadyExists(
        reason=Reason.WORKER_ID_TAKEN,
        message=f"another process works as {worker_id!r}, heard of within its lease period; give this one a "
        "name of its own (LUTHIER_WORKER_NAME), or stop the other",
        metadata={"worker": worker_id},
        retry_after_seconds=seconds,
    )
