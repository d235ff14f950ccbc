"""What a worker measures of itself, for operators."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from luthier.errors import Reason
from luthier.work.machine import available_bytes
from luthier.worker.v1.worker_service_pb2 import WorkerFigures

NURSERY = "NURSERY"
"""Beside reasons: the process that children are forked from ended, and another began."""
CHILD_FAILURES = (str(Reason.CRASHED), str(Reason.STALLED), str(Reason.OUT_OF_MEMORY), NURSERY)
_FRESH_SECONDS = 5.0
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class ChildCounts:
    """How many children were given work, and how many failed. For any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._failures: Counter[str] = Counter()
        self.num_starts = 0
        self.num_running = 0

    def began(self) -> None:
        """Count a child that is given work."""
        with self._lock:
            self.num_starts += 1
            self.num_running += 1

    def ended(self) -> None:
        """Count a child that has none any more."""
        with self._lock:
            self.num_running -= 1

    def failed(self, reason: str) -> None:
        """Count one that ended before its work did; reasons that are not of children are the work's own."""
        if reason in CHILD_FAILURES:
            with self._lock:
                self._failures[reason] += 1

    @property
    def failures(self) -> dict[str, int]:
        """Those that failed, by reason."""
        with self._lock:
            return dict(self._failures)


class Measured:
    """A worker's figures, measured again when they are some seconds old: a heartbeat comes more often."""

    def __init__(self, counts: ChildCounts) -> None:
        self._counts = counts
        self._figures = WorkerFigures()
        self._at = -_FRESH_SECONDS

    def __call__(self) -> WorkerFigures | None:
        """Return them where they are new."""
        now = time.monotonic()
        if now - self._at < _FRESH_SECONDS:
            return None
        self._at = now
        return WorkerFigures(
            resident_bytes=sum(map(resident_bytes, family_of(os.getpid()))),
            available_bytes=available_bytes() or 0,
            num_children=self._counts.num_running,
            num_child_starts=self._counts.num_starts,
            num_child_failures=self._counts.failures,
        )


def family_of(pid: int) -> Iterator[int]:
    """Yield a process and all that it and its children have started, as far as they are there."""
    yield pid
    tasks = Path(f"/proc/{pid}/task")
    try:
        threads = os.listdir(tasks)
    except OSError:  # it has ended meanwhile
        return
    for thread in threads:
        for child in _text(tasks / thread / "children").split():
            yield from family_of(int(child))


def resident_bytes(pid: int) -> int:
    """Return the memory that a process holds, shared pages included; 0 where the system does not tell."""
    fields = _text(Path(f"/proc/{pid}/statm")).split()
    return int(fields[1]) * _PAGE_BYTES if fields else 0


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
