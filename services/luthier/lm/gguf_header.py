"""What a GGUF file says that it holds, compared with its size before a library believes it.

The `gguf` package (up to 0.19) counts an array's elements by what the file says and reads past its end without an
error: forty bytes that promise 2^63 numbers keep it busy for ever, and take all memory.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from mmap import ACCESS_READ, mmap
from pathlib import Path

from luthier.errors import InvalidArgument, Reason

_BYTES: Mapping[int, int] = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a value of each kind of number."""
_STRING, _ARRAY = 8, 9
_MAGIC_BYTES = 4
_LEAST_PAIR, _LEAST_TENSOR, _LEAST_STRING, _LEAST_ARRAY = 8 + 4 + 1, 8 + 4 + 4 + 8, 8, 4 + 8
"""Bytes that each takes at least."""
_DEEPEST = 4
_MOST_ELEMENTS = 1 << 24
"""Of an array of texts: some hundred times a vocabulary."""


def require_sound_header(path: Path) -> None:
    """Return if all that the metadata of a GGUF file announces can lie in the file. Its tensors are not looked at.

    Raises:
        InvalidArgument: MODEL_INVALID; the first thing that cannot, with the number that it has.
    """
    with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as data:
        metadata = _Metadata(data)
        num_tensors, num_pairs = metadata.number(8), metadata.number(8)
        metadata.require(num_tensors, _LEAST_TENSOR, "tensors")
        metadata.require(num_pairs, _LEAST_PAIR, "key-value pairs")
        for _ in range(num_pairs):
            metadata.skip(metadata.number(8), 1, "bytes of a key")
            metadata.skip_value(metadata.number(4), 0)


class _Metadata:
    """A walk over metadata, from behind the version on."""

    def __init__(self, data: mmap) -> None:
        self._data = data
        self._place = _MAGIC_BYTES
        self._order = "<"
        version = self.number(4)
        if version and not version & 0xFFFF:  # written by a machine of the other byte order
            self._order = ">"

    def number(self, size: int) -> int:
        """Read a whole number of 4 or 8 bytes."""
        place = self._place
        self.skip(1, size, "number")
        (found,) = struct.unpack_from(f"{self._order}{'I' if size == 4 else 'Q'}", self._data, place)
        return int(found)

    def require(self, count: int, size: int, what: str) -> None:
        """Refuse more of something, of at least `size` bytes each, than what is left of the file can hold."""
        left = len(self._data) - self._place
        if count * size > left:
            raise _invalid(
                f"a GGUF file must hold what it announces, {count} {what} cannot lie in the {left} bytes from byte "
                f"{self._place} on"
            )

    def skip(self, count: int, size: int, what: str) -> None:
        """Pass over something."""
        self.require(count, size, what)
        self._place += count * size

    def skip_value(self, kind: int, depth: int) -> None:
        """Pass over a value of a kind."""
        if kind in _BYTES:
            self.skip(1, _BYTES[kind], "value")
        elif kind == _STRING:
            self.skip(self.number(8), 1, "bytes of a text")
        elif kind == _ARRAY and depth < _DEEPEST:
            self._skip_array(self.number(4), self.number(8), depth)
        else:
            raise _invalid(
                f"values of a GGUF file must be of kinds 0 to 12, arrays at most {_DEEPEST} deep, got kind {kind}"
            )

    def _skip_array(self, kind: int, count: int, depth: int) -> None:
        if kind in _BYTES:
            self.skip(count, _BYTES[kind], "elements of an array")
            return
        self.require(count, _LEAST_STRING if kind == _STRING else _LEAST_ARRAY, "elements of an array")
        if count > _MOST_ELEMENTS:
            raise _invalid(f"an array of a GGUF file must have at most {_MOST_ELEMENTS} texts, got {count}")
        for _ in range(count):
            self.skip_value(kind, depth + 1)


def _invalid(message: str) -> InvalidArgument:
    return InvalidArgument(message, reason=Reason.MODEL_INVALID)
