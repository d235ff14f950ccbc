"""Two trainings that take turns step by step: while one works, the other's processes are stopped. For `devices.py`.

Machines are shared, and how fast one is changes within seconds, by more than what is measured here. So both sides live
at once, and each has the machine for a step at a time.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

_MARK = "LUTHIER_BENCHMARK_SIDE"
_WARM_STEPS = 2
"""The first ones find kernels and threads cold."""
_LONGEST_SECONDS = 900.0


@dataclass(slots=True, kw_only=True)
class Side:
    """A training that can be stopped and goes on.

    Attributes:
        name: unlike the other's, and part of the environment of all its processes (`environment`).
        run: trains, and calls its argument whenever a step has ended.
        seconds: of each of its steps, the time of the other's not counted.
    """

    name: str
    run: Callable[[Callable[[], None]], None]
    seconds: list[float] = field(default_factory=list)

    @property
    def environment(self) -> Mapping[str, str]:
        """What tells its processes from all others."""
        return {_MARK: self._mark}

    @property
    def _mark(self) -> str:
        return f"{self.name}-{os.getpid()}"

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to each of its processes."""
        wanted = f"{_MARK}={self._mark}".encode()
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it ended meanwhile
                if wanted in (folder / "environ").read_bytes().split(b"\0"):
                    os.kill(int(folder.name), number)


def take_turns(first: Side, second: Side) -> None:
    """Run both to their ends; their `seconds` are of the steps that both of them made in turns, the first left out.

    Raises:
        Exception: what one of them raised.
        TimeoutError: they did not end.
    """
    _Turns(first, second).run()


class _Turns:
    def __init__(self, first: Side, second: Side) -> None:
        self._sides = (first, second)
        self._threads = [
            threading.Thread(target=self._work, args=(place,), name=side.name, daemon=True)
            for place, side in enumerate(self._sides)
        ]
        self._lock = threading.Lock()
        self._active = 0
        self._last = 0.0
        self._num_cold = [_WARM_STEPS, _WARM_STEPS]
        self._ahead = [0.0, 0.0]
        self._is_over = False
        self._errors: list[Exception] = []

    def run(self) -> None:
        try:
            self._threads[0].start()
            until = time.monotonic() + _LONGEST_SECONDS
            for thread in self._threads:
                # The second begins while the first lives, or never.
                if thread.ident:
                    self._join(thread, until)
        finally:
            self._is_over = True
            for side in self._sides:
                side.signal(signal.SIGCONT)
        if self._errors:
            raise self._errors[0]
        fewest = min(len(side.seconds) for side in self._sides)
        for side in self._sides:
            del side.seconds[fewest:]

    def _join(self, thread: threading.Thread, until: float) -> None:
        thread.join(max(0.0, until - time.monotonic()))
        if thread.is_alive():
            raise TimeoutError(f"the {thread.name} must end within {_LONGEST_SECONDS:g} s")

    def _work(self, place: int) -> None:
        try:
            self._sides[place].run(lambda: self._heard(place))
        except Exception as error:
            self._errors.append(error)
        with self._lock:
            # Whoever is left has the machine for itself, which is no turn.
            self._is_over = True
            self._sides[1 - place].signal(signal.SIGCONT)

    def _heard(self, place: int) -> None:
        now = time.perf_counter()
        with self._lock:
            if self._is_over or place != self._active:
                return
            side = self._sides[place]
            if not self._num_cold[place]:
                side.seconds.append(now - self._last)
            elif self._num_cold[place] > 1:
                self._num_cold[place] -= 1
                return
            self._num_cold[place] = 0
            side.signal(signal.SIGSTOP)
            # So long it has worked on its next step already.
            self._ahead[place] = time.perf_counter() - now
            self._active = 1 - place
            other = self._threads[self._active]
            if other.ident:
                self._sides[self._active].signal(signal.SIGCONT)
            else:
                other.start()
            self._last = time.perf_counter() - self._ahead[self._active]
