"""What a rank shows of itself while it works: that it lives and does not sleep, and which exchange it is in.

A file that the rank maps and its driver reads, on one machine: to show costs the rank no call, so that it may do it for
every exchange, and what it shows stands when the rank does.
"""

from __future__ import annotations

import mmap
import os
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from luthier.training.executors.slumber import Slumber

BEAT_SECONDS = 0.5
_LAYOUT = struct.Struct("=6q")
_BEATS, _ENTERED, _LEFT, _NUM_BYTES, _ASLEEP = (8 * place for place in range(1, 6))
_ONE = struct.Struct("=q")


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """What a rank showed last.

    Attributes:
        pid: of its process.
        beats: how often a thread of its own has counted, every `BEAT_SECONDS` while the process runs.
        entered: exchanges that it began.
        left: exchanges that it ended.
        num_bytes: what the last one begun moves.
        asleep: beats in a row for which the thread that works has slept, and waited neither for the others nor for the
            driver.
        cpu: time that its process has had of the processors, as the kernel of its machine says; empty: it says none.
    """

    pid: int
    beats: int
    entered: int
    left: int
    num_bytes: int
    asleep: int = 0
    cpu: tuple[str, ...] = ()


class Pulse:
    """A rank's own: it beats from now to `close`, or to the end of the process. Exchanges are one thread's."""

    def __init__(self, path: Path) -> None:
        aside = path.with_suffix(".new")
        aside.write_bytes(_LAYOUT.pack(os.getpid(), 0, 0, 0, 0, 0))
        with aside.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), _LAYOUT.size)
        aside.replace(path)
        self._entered = self._left = 0
        self._num_asked = 0
        self._slumber: Slumber | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="pulse", daemon=True)
        self._thread.start()

    def enter(self, num_bytes: int) -> None:
        """Note that the rank waits for the others, to exchange so many bytes."""
        self._entered += 1
        self._put(_NUM_BYTES, num_bytes)
        self._put(_ENTERED, self._entered)

    def leave(self) -> None:
        """Note that it has what they exchanged."""
        self._left += 1
        self._put(_LEFT, self._left)

    @contextmanager
    def working(self) -> Iterator[None]:
        """Give a block in which this thread works: it is looked at, whether it sleeps.

        Not for a rank on a GPU, for which a thread may sleep while the GPU computes.
        """
        self._slumber = Slumber()
        try:
            yield
        finally:
            self._slumber = None

    @contextmanager
    def asking(self) -> Iterator[None]:
        """Give a block in which the thread that works waits for the driver, which may take as long as it likes."""
        self._num_asked += 1
        try:
            yield
        finally:
            self._num_asked -= 1

    def close(self) -> None:
        """Beat no more."""
        self._closed.set()
        self._thread.join()
        self._map.close()

    def _beat(self) -> None:
        beats = asleep = 0
        while not self._closed.wait(BEAT_SECONDS):
            beats += 1
            asleep = asleep + 1 if self._is_asleep() else 0
            self._put(_ASLEEP, asleep)
            self._put(_BEATS, beats)

    def _is_asleep(self) -> bool:
        slumber = self._slumber
        if slumber is None or self._num_asked or self._entered != self._left:
            return False
        return slumber.lasts()

    def _put(self, place: int, value: int) -> None:
        _ONE.pack_into(self._map, place, value)


def shown(path: Path) -> Shown | None:
    """Return what a rank of this machine shows; None before it begins."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    pid, beats, entered, left, num_bytes, asleep = _LAYOUT.unpack(data)
    return Shown(
        pid=pid, beats=beats, entered=entered, left=left, num_bytes=num_bytes, asleep=asleep, cpu=_cpu(pid)
    )


def _cpu(pid: int) -> tuple[str, ...]:
    try:
        return tuple(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13])
    except OSError:
        return ()
