"""The phases of an attempt in its trace: what its worker, or the worker's child, says that it is at."""

from __future__ import annotations

import time
from collections.abc import Callable

from luthier.runtime import tracing


class PhaseSpans:
    """Keeps each phase as a span, from the moment that it is heard of until another one is, or `end`.

    For one thread at a time, in the context of the attempt.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._phase = ""
        self._began = 0.0

    def enter(self, phase: str) -> None:
        """Say what is done from now on; the same as before changes nothing."""
        if phase != self._phase:
            self.end()
            self._phase, self._began = phase, self._clock()

    def end(self) -> None:
        """Say that the last phase is over."""
        if self._phase:
            tracing.past(self._phase, self._clock() - self._began)
        self._phase = ""
