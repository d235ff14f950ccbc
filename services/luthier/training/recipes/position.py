"""Where a run is: the step, and the rows of the pass that it makes, noted so that they outlive its process.

A file that the process maps and that whoever watches it reads: to note a pass costs no call, so that it may be done for
each, and what was noted stands when the process is gone.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from luthier.training.recipes.mixture import Mixture

FILE_NAME = "position"
NAMED_ROWS = 20
"""Rows that a failure names, of many."""
_NOWHERE = -1
_HEAD = struct.Struct("=3q")
_ROW = struct.Struct("=2q")
_SIZE_BYTES = _HEAD.size + NAMED_ROWS * _ROW.size


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """Where a run is.

    Attributes:
        step: that it makes; 0: none yet.
        rows: the first of those at hand, each as the place of its rendering among the run's, and its number there.
        num_rows: how many are at hand.
    """

    step: int
    rows: tuple[tuple[int, int], ...]
    num_rows: int


class Mark:
    """Notes where a run is in a file, from the first pass on; without a file it notes nothing.

    Args:
        path: the file, made anew.
        mixture: of which renderings the rows are; None: of one.
    """

    def __init__(self, path: Path | None = None, mixture: Mixture | None = None) -> None:
        self._mixture = mixture
        self._step = 0
        self._map: mmap.mmap | None = None
        if path is not None:
            # All of it is there from now on: a full disk would end the process at a later write.
            path.write_bytes(_HEAD.pack(_NOWHERE, 0, 0).ljust(_SIZE_BYTES, b"\0"))
            with path.open("r+b") as file:
                self._map = mmap.mmap(file.fileno(), _SIZE_BYTES)

    def begin(self, step: int, rows: Sequence[int]) -> None:
        """Note that a step of these rows begins."""
        self._step = step
        self.at(rows)

    def at(self, rows: Sequence[int]) -> None:
        """Note that a pass over these rows begins; none: that of before still stands."""
        if self._map is None or not rows:
            return
        # Of answers that were drawn several are of one row.
        every = tuple(dict.fromkeys(rows))
        named = every[:NAMED_ROWS]
        for number, row in enumerate(named):
            place = (0, row) if self._mixture is None else self._mixture.numbered(row)
            _ROW.pack_into(self._map, _HEAD.size + number * _ROW.size, *place)
        _HEAD.pack_into(self._map, 0, self._step, len(every), len(named))

    def leave(self) -> None:
        """Note that no rows are at hand."""
        if self._map is not None:
            _HEAD.pack_into(self._map, 0, _NOWHERE, 0, 0)

    def close(self) -> None:
        """Note that no rows are at hand, and nothing any more."""
        self.leave()
        self._map = None


def noted(path: Path) -> Position | None:
    """Return where a run is, or was when its process ended; None: no rows are at hand, or nothing is noted."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    if len(data) != _SIZE_BYTES:
        return None
    step, num_rows, num_named = _HEAD.unpack_from(data)
    if step == _NOWHERE or not 0 < num_named <= NAMED_ROWS:
        return None
    places = (_ROW.unpack_from(data, _HEAD.size + number * _ROW.size) for number in range(num_named))
    return Position(step=step, rows=tuple((source, row) for source, row in places), num_rows=num_rows)
