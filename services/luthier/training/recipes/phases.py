"""Where the time of a run goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, get_args

Phase = Literal["data", "compute", "sampling", "validation", "checkpoint", "waiting"]
"""Reading rows; passes and updates; drawing and grading answers; validating; copying a checkpoint and waiting for the
one before; telling whoever watches."""
PHASES: tuple[Phase, ...] = get_args(Phase)


class PhaseClock:
    """Gives each moment, from the first phase on, to the phase that was entered last."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._seconds: dict[Phase, float] = {}
        self._phase: Phase | None = None
        self._since = 0.0

    def enter(self, phase: Phase | None) -> None:
        """Begin a phase, which ends the one before; None: the time that follows is nobody's."""
        now = self._clock()
        if self._phase is not None:
            self._seconds[self._phase] = self._seconds.get(self._phase, 0.0) + now - self._since
        self._phase, self._since = phase, now

    @contextmanager
    def within(self, phase: Phase) -> Iterator[None]:
        """Be in a phase for the length of a block, and then again in the one before."""
        before = self._phase
        self.enter(phase)
        try:
            yield
        finally:
            self.enter(before)

    def seconds(self) -> dict[Phase, float]:
        """Return what each phase has had so far; those that never began are left out."""
        self.enter(self._phase)
        return dict(self._seconds)
