"""Lease deadlines on the monotonic clock of the process that grants them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable


class Leases:
    """Deadlines of live leases by task id.

    They live in memory only: after a restart every lease that the database knows gets one full period,
    because the silence was the service's own.
    """

    def __init__(self, lease_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.lease_seconds = lease_seconds
        self._clock = clock
        self._deadlines: dict[str, float] = {}

    def renew(self, task_id: str) -> None:
        """Give a task one full period from now."""
        self._deadlines[task_id] = self._clock() + self.lease_seconds

    def adopt(self, task_ids: Iterable[str]) -> None:
        """Give tasks that were leased before this process began one full period."""
        for task_id in task_ids:
            self.renew(task_id)

    def end(self, task_id: str) -> None:
        """Forget a lease."""
        self._deadlines.pop(task_id, None)

    def is_overdue(self, task_id: str) -> bool:
        """Tell whether a task's holder was silent for a full period."""
        return task_id in self._deadlines and self._deadlines[task_id] <= self._clock()

    def overdue(self) -> list[str]:
        """Return the ids of tasks whose holder was silent for a full period."""
        return [task_id for task_id in self._deadlines if self.is_overdue(task_id)]
