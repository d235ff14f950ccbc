"""Whether a child still does its work, from what it says and what the kernel says of it."""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from luthier.work.child import Alive, Call, Idle, Message
from luthier.work.child_ends import peak_bytes
from luthier.work.events import Severity

_LOOK_SECONDS = 1.0
_STEPS = 100
_logger = logging.getLogger(__name__)


class Overseer(Protocol):
    """Who wants the work: a task's context."""

    def check(self) -> None:
        """Return if the work is still wanted; it shows signs of life."""
        ...

    def heed(self) -> None:
        """Return if the work is still wanted."""
        ...

    def log(self, text: str, severity: Severity = "INFO") -> None:
        """Report a line for people."""
        ...


class Always:
    """Wants a child for as long as it takes, and says in this process's log what it hears."""

    def check(self) -> None:
        """It is wanted."""

    def heed(self) -> None:
        """It is wanted."""

    def log(self, text: str, severity: Severity = "INFO") -> None:
        """Say it."""
        _logger.log(logging.getLevelName(severity), text)


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long a child may go without a sign that it does its work.

    Attributes:
        still_seconds: it neither computes, reads, writes nor says anything.
        first_seconds: it computes and says nothing, before its first step: it loads, and compiles kernels.
        silent_seconds: it computes and says nothing, at least, after its first step.
        median_steps: or as long as so many of its steps of late, where that is more.
    """

    still_seconds: float = 120.0
    first_seconds: float = 1800.0
    silent_seconds: float = 300.0
    median_steps: float = 20.0


class Stalled(Exception):
    """A child does not go on; the text says how that shows."""


class Watch:
    """Watches a child while it works for an overseer.

    Args:
        pid: of the child.
        patience: what it may do.
        overseer: asked often whether the work is still wanted.
        step: name of the call that it makes after each step; empty: it makes none, and may compute for as long as it
            likes.
    """

    def __init__(self, pid: int, patience: Patience, overseer: Overseer, step: str = "") -> None:
        self._pid = pid
        self._patience = patience
        self._overseer = overseer
        self._step = step
        self._step_seconds: deque[float] = deque(maxlen=_STEPS)
        self._step_at: float | None = None
        self._cpu, self._moved = _signs(pid)
        self._heard_at = self._computed_at = self._looked_at = time.monotonic()
        self.peak_bytes = 0

    def heard(self, message: Message) -> None:
        """Note that the child said something."""
        now = self._heard_at = self._computed_at = time.monotonic()
        if isinstance(message, Alive):
            self._overseer.check()
        if isinstance(message, Idle) and self._step_at is not None:
            self._step_at = now  # the next step begins no sooner
        if isinstance(message, Call) and message.name == self._step:
            if self._step_at is not None:
                self._step_seconds.append(now - self._step_at)
            self._step_at = now

    def served(self) -> None:
        """Note that the child waited for its driver until now, and look at it: who calls all the time is never silent.

        Raises:
            LuthierError: as `look`.
        """
        self._heard_at = self._computed_at = time.monotonic()
        self.look()

    def look(self) -> None:
        """Look at the child: again and again while it says nothing, and after each of its calls.

        Raises:
            Stalled: it does not go on.
            LuthierError: the work is not wanted any more.
        """
        self._overseer.heed()
        now = time.monotonic()
        if now - self._looked_at < _LOOK_SECONDS:
            return
        self._looked_at = now
        self.peak_bytes = max(self.peak_bytes, peak_bytes(self._pid))
        cpu, moved = _signs(self._pid)
        if moved != self._moved:
            self._heard_at = now
        if (cpu, moved) != (self._cpu, self._moved):
            self._computed_at = now
            self._overseer.check()
        self._cpu, self._moved = cpu, moved
        if now - self._computed_at > self._patience.still_seconds:
            raise Stalled(f"it stood still for {self._patience.still_seconds:g} s")
        if now - self._heard_at > self._silence_seconds():
            raise Stalled(f"it computed for {now - self._heard_at:.0f} s and came to no end of a step")

    def _silence_seconds(self) -> float:
        if not self._step:
            return math.inf
        if self._step_at is None:
            return self._patience.first_seconds
        steps = statistics.median(self._step_seconds) if self._step_seconds else 0.0
        return max(self._patience.silent_seconds, self._patience.median_steps * steps)


def _signs(pid: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return what changes while a process computes, and while it reads or writes; empty where nobody tells."""
    cpu = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()[11:13]
    moved = _read(f"/proc/{pid}/io").splitlines()[:2]
    return tuple(cpu), tuple(moved)


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
