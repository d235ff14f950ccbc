"""Several limited processes for many who ask at once, so that nobody's slow request holds up the others'."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from luthier.errors import Reason, ResourceExhausted, Unavailable
from luthier.work.limited import Check, LimitedProcess, ProcessKilled, spawned
from luthier.work.limited_child import Limits

POOL_PROCESSES = 4
_POLL_SECONDS = 0.1
_RETRY_SECONDS = 1.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Ticket:
    key: str


class LimitedPool:
    """At most `size` processes, started when first needed and kept; all methods for any thread.

    Requests of one key have at most all processes but one, so that another key's find one free; of those who wait
    the key with the fewest processes comes first, then who came first.

    Args:
        module: what the processes run.
        limits: what each request may take.
        wait_seconds: longest wait for a process.
    """

    def __init__(
        self, module: str, limits: Limits, *, size: int = POOL_PROCESSES, wait_seconds: float = 60.0
    ) -> None:
        self._module = module
        self._limits = limits
        self._size = size
        self._wait_seconds = wait_seconds
        self._changed = threading.Condition()
        self._waiting: list[_Ticket] = []
        self._busy: Counter[str] = Counter()
        self._idle: list[tuple[str, LimitedProcess]] = []
        self._working: set[LimitedProcess] = set()
        self._closed = False

    def call(self, key: str, request: Mapping[str, Any], *, check: Check = lambda: None) -> dict[str, Any]:
        """Return the result of a request. Requests of equal keys prefer the process that had the key last.

        Raises:
            ResourceExhausted: OVERLOADED, no process was free in time.
            Unavailable: SHUTTING_DOWN, the pool is closed; WORKER_LOST, the process was killed twice from outside.
            LimitReached, ProcessBroken, LuthierError: as `LimitedProcess.call`.
        """
        try:
            return self._once(key, request, check)
        except ProcessKilled:
            # It may have been idle when it was killed: the request itself is not to blame.
            pass
        try:
            return self._once(key, request, check)
        except ProcessKilled as error:
            raise Unavailable(
                "the limited process that had the request was killed from outside; try again",
                reason=Reason.WORKER_LOST,
                retry_after_seconds=_RETRY_SECONDS,
            ) from error

    def close(self) -> None:
        """End all processes; requests under way end by `Unavailable`."""
        with self._changed:
            self._closed = True
            idle, self._idle = self._idle, []
            for process in self._working:
                process.kill()
            self._changed.notify_all()
        for _, process in idle:
            process.close()

    def _once(self, key: str, request: Mapping[str, Any], check: Check) -> dict[str, Any]:
        with self._place(key, check):
            process = self._take(key)
            with self._changed:
                self._working.add(process)
                if self._closed:
                    process.kill()
            try:
                return process.call(request, check=check)
            finally:
                self._give_back(key, process)

    @contextmanager
    def _place(self, key: str, check: Check) -> Iterator[None]:
        ticket = _Ticket(key=key)
        deadline = time.monotonic() + self._wait_seconds
        with self._changed:
            self._waiting.append(ticket)
            try:
                while not self._changed.wait_for(lambda: self._is_next(ticket), _POLL_SECONDS):
                    check()
                    self._require_time(deadline)
            finally:
                self._waiting.remove(ticket)
                self._changed.notify_all()
            self._busy[key] += 1
        try:
            yield
        finally:
            with self._changed:
                self._busy[key] -= 1
                if not self._busy[key]:
                    del self._busy[key]
                self._changed.notify_all()

    def _is_next(self, ticket: _Ticket) -> bool:
        if self._closed:
            raise Unavailable("the worker shuts down", reason=Reason.SHUTTING_DOWN)
        most = max(1, self._size - 1)
        if self._busy.total() >= self._size or self._busy[ticket.key] >= most:
            return False
        free = [one for one in self._waiting if self._busy[one.key] < most]
        return min(free, key=lambda one: self._busy[one.key]) is ticket

    def _require_time(self, deadline: float) -> None:
        if time.monotonic() > deadline:
            raise ResourceExhausted(
                f"{len(self._waiting)} requests wait for a limited process, for "
                f"{self._wait_seconds:g} s and more",
                reason=Reason.OVERLOADED,
                retry_after_seconds=_RETRY_SECONDS,
            )

    def _take(self, key: str) -> LimitedProcess:
        with self._changed:
            known = [one for one in self._idle if one[0] == key] or self._idle[:1]
            for one in known[:1]:
                self._idle.remove(one)
        for _, process in known[:1]:
            if process.alive:
                return process
            process.close()
        return spawned(self._module, self._limits)

    def _give_back(self, key: str, process: LimitedProcess) -> None:
        with self._changed:
            self._working.discard(process)
            if process.alive and not self._closed:
                self._idle.append((key, process))
                return
        process.close()
