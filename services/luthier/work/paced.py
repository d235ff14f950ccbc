"""Something done now and then, where there is occasion for it far more often."""

from __future__ import annotations

import time
from collections.abc import Callable

REPORT_SECONDS = 10.0
"""Between two reports of work that goes on: each is an event that is kept; alerts wait for a quarter of an hour."""


class Paced:
    """Says when so many seconds have passed since it was made, or last said so. For one thread."""

    def __init__(self, seconds: float = REPORT_SECONDS, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds = seconds
        self._clock = clock
        self._due_at = clock() + seconds

    def due(self) -> bool:
        """Tell whether it is time; the next time is so many seconds later."""
        now = self._clock()
        if now < self._due_at:
            return False
        self._due_at = now + self._seconds
        return True
