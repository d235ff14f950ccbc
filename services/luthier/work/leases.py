"""Lease deadlines on the monotonic clock of the process that grants them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

LONGEST_ROUND_SECONDS = 3.0
"""A longer time between two rounds of expiry means that this process, not its workers, was away."""


class Leases:
    """Deadlines of live leases by task id.

    They live in memory only: after a restart, and after any pause of this process, every lease gets one full
    period, because the silence was the service's own.
    """

    def __init__(self, lease_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.lease_seconds = lease_seconds
        self._clock = clock
        self._deadlines: dict[str, float] = {}
        self._last_round: float | None = None

    def begin_round(self) -> bool:
        """Note that leases are looked at now; tell whether this process was away since the last time.

        If it was, every lease gets one full period.
        """
        now, last = self._clock(), self._last_round
        self._last_round = now
        if last is None or now - last <= LONGEST_ROUND_SECONDS:
            return False
        self._deadlines = dict.fromkeys(self._deadlines, now + self.lease_seconds)
        return True

    def grant(self, task_id: str) -> None:
        """Give a task one full period from now: it was handed out, or its holder spoke."""
        self._deadlines[task_id] = self._clock() + self.lease_seconds

    def adopt(self, task_ids: Iterable[str]) -> None:
        """Give tasks that were leased before this process began one full period."""
        for task_id in task_ids:
            self.grant(task_id)

    def end(self, task_id: str) -> None:
        """Forget a lease."""
        self._deadlines.pop(task_id, None)

    def remaining_seconds(self, task_id: str) -> float:
        """Return the time until a lease runs out; 0 when it is overdue or not known."""
        return max(0.0, self._deadlines.get(task_id, 0.0) - self._clock())

    def is_overdue(self, task_id: str) -> bool:
        """Tell whether a task's holder was silent for a full period."""
        return task_id in self._deadlines and self._deadlines[task_id] <= self._clock()

    def overdue(self) -> list[str]:
        """Return the ids of tasks whose holder was silent for a full period."""
        return [task_id for task_id in self._deadlines if self.is_overdue(task_id)]
