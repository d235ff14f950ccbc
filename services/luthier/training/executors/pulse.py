"""What a rank shows of itself while it works: that it lives, and which exchange with the others it is in.

A file that the rank maps and its driver reads, on one machine: to show costs the rank no call, so that it may do it for
every exchange, and what it shows stands when the rank does.
"""

from __future__ import annotations

import mmap
import os
import struct
import threading
from dataclasses import dataclass
from pathlib import Path

BEAT_SECONDS = 0.5
_LAYOUT = struct.Struct("=5q")
_BEATS, _ENTERED, _LEFT, _NUM_BYTES = (8 * place for place in range(1, 5))
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
        cpu: time that its process has had of the processors, as the kernel of its machine says; empty: it says none.
    """

    pid: int
    beats: int
    entered: int
    left: int
    num_bytes: int
    cpu: tuple[str, ...] = ()


class Pulse:
    """A rank's own: it beats from now to `close`, or to the end of the process. Exchanges are one thread's."""

    def __init__(self, path: Path) -> None:
        aside = path.with_suffix(".new")
        aside.write_bytes(_LAYOUT.pack(os.getpid(), 0, 0, 0, 0))
        with aside.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), _LAYOUT.size)
        aside.replace(path)
        self._entered = self._left = 0
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

    def close(self) -> None:
        """Beat no more."""
        self._closed.set()
        self._thread.join()
        self._map.close()

    def _beat(self) -> None:
        beats = 0
        while not self._closed.wait(BEAT_SECONDS):
            beats += 1
            self._put(_BEATS, beats)

    def _put(self, place: int, value: int) -> None:
        _ONE.pack_into(self._map, place, value)


def shown(path: Path) -> Shown | None:
    """Return what a rank of this machine shows; None before it begins."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    pid, beats, entered, left, num_bytes = _LAYOUT.unpack(data)
    return Shown(pid=pid, beats=beats, entered=entered, left=left, num_bytes=num_bytes, cpu=_cpu(pid))


def _cpu(pid: int) -> tuple[str, ...]:
    try:
        return tuple(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13])
    except OSError:
        return ()
