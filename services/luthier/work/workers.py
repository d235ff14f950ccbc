"""Workers that made themselves known to this process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from luthier.errors import FailedPrecondition, Reason
from luthier.work.metrics import WorkMetrics
from luthier.work.tasks import TaskKind


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """A registered worker; `instance` tells its processes apart."""

    worker_id: str
    instance: str
    kinds: tuple[TaskKind, ...]

    @property
    def holder(self) -> str:
        """Name under which it holds leases."""
        return f"{self.worker_id}@{self.instance}"


class Workers:
    """Registered workers by id. Kept in memory: after a restart of the service workers register again."""

    def __init__(self, metrics: WorkMetrics) -> None:
        self._workers: dict[str, Worker] = {}
        self._metrics = metrics

    def register(self, worker_id: str, instance: str, kinds: Sequence[TaskKind]) -> None:
        """Make a worker known, in place of its former process."""
        self._workers[worker_id] = Worker(worker_id=worker_id, instance=instance, kinds=tuple(kinds))
        self._metrics.workers.set(len(self._workers))

    def known(self, worker_id: str) -> Worker:
        """Return a registered worker.

        Raises:
            FailedPrecondition: it did not register with this process.
        """
        worker = self._workers.get(worker_id)
        if worker is None:
            raise FailedPrecondition(
                reason=Reason.WRONG_STATE,
                message=f"worker {worker_id!r} is not registered here; call RegisterWorker first",
                metadata={"worker": worker_id},
            )
        return worker
