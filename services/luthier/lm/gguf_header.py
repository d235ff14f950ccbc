"""What a GGUF file says that it holds, compared with its size before a library believes it.

The `gguf` package (up to 0.19) counts an array's elements by what the file says and reads past its end without an
error: forty bytes that promise 2^63 numbers keep it busy for ever, and take all memory. Of what is there it makes an
object of some 700 bytes for each number and two for each text, so that a byte may cost it 700.
"""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from mmap import ACCESS_READ, mmap
from pathlib import Path

from luthier.errors import InvalidArgument, Reason

_BYTES: Mapping[int, int] = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a value of each kind of number."""
_WHOLE: Mapping[int, str] = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 10: "Q", 11: "q"}
"""How `struct` names each kind of whole number."""
_END_KEYS = (b"tokenizer.ggml.eot_token_id", b"tokenizer.ggml.eom_token_id")
_STRING, _ARRAY = 8, 9
_MAGIC_BYTES = 4
_NUM_TENSORS_AT, _NUM_TENSORS_BYTES = 8, 8
"""Where the number of tensors stands."""
_PIECE_BYTES = 1 << 20
_LEAST_PAIR, _LEAST_TENSOR, _LEAST_STRING, _LEAST_ARRAY = 8 + 4 + 1, 8 + 4 + 4 + 8, 8, 4 + 8
"""Bytes that each takes at least."""
_DEEPEST = 4
_MOST_OBJECTS = 10_000_000
"""Of all that a file says, 7 GB of them: a million tokens with scores, kinds and two merges each are 8 million."""
_TEXT_OBJECTS, _ARRAY_OBJECTS, _PAIR_OBJECTS, _TENSOR_OBJECTS = 2, 2, 4, 8
"""What the package makes of each; of a number one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufHeader:
    """What is taken from the metadata of a GGUF file without the package.

    Attributes:
        end_ids: tokens by which an answer ends, besides the end of sequence; the file may name what it has not.
        size_bytes: of the metadata, from the file's beginning on.
    """

    end_ids: tuple[int, ...]
    size_bytes: int


def read_header(path: Path) -> GgufHeader:
    """Read the metadata of a GGUF file, if all that it announces can lie in the file. Its tensors are not looked at.

    Raises:
        InvalidArgument: MODEL_INVALID; the first thing that cannot, with the number that it has; or there is more than
            the package can make objects of in some gigabytes; or an end of answers is no whole number.
    """
    with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as data:
        metadata = _Metadata(data)
        ends: dict[bytes, int] = {}
        for key, kind in metadata.pairs():
            if key in _END_KEYS:
                ends.setdefault(key, metadata.whole_number(kind, key))
            else:
                metadata.skip_value(kind, 0)
    end_ids = tuple(ends[key] for key in _END_KEYS if key in ends)
    return GgufHeader(end_ids=end_ids, size_bytes=metadata.place)


def metadata_bytes(path: Path) -> int:
    """Return how long the metadata of a GGUF file is, whatever it says. Raises as `read_header`, but for ends."""
    with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as data:
        metadata = _Metadata(data)
        for _, kind in metadata.pairs():
            metadata.skip_value(kind, 0)
    return metadata.place


@contextmanager
def metadata_alone(path: Path, size_bytes: int, scratch: Path) -> Iterator[Path]:
    """Write a GGUF file of another's metadata, without tensors, under its name into a folder of its own for a block.

    All of a tokenizer is there; and who reads a GGUF file maps it, which counts where address space is limited.
    """
    with tempfile.TemporaryDirectory(dir=scratch, prefix="metadata-") as folder:
        alone = Path(folder) / path.name
        with path.open("rb") as whole, alone.open("wb") as file:
            while piece := whole.read(min(_PIECE_BYTES, size_bytes - file.tell())):
                file.write(piece)
            file.seek(_NUM_TENSORS_AT)
            file.write(bytes(_NUM_TENSORS_BYTES))
        yield alone


class _Metadata:
    """A walk over metadata, from behind the version on.

    Attributes:
        place: how far it has come.
    """

    def __init__(self, data: mmap) -> None:
        self._data = data
        self.place = _MAGIC_BYTES
        self._order = "<"
        self._num_objects = 0
        version = self.number(4)
        if version and not version & 0xFFFF:  # written by a machine of the other byte order
            self._order = ">"

    def pairs(self) -> Iterator[tuple[bytes, int]]:
        """Walk over the counts, then yield the key and the kind of each value, which is read or passed over next."""
        num_tensors, num_pairs = self.number(8), self.number(8)
        self.announce(num_tensors, _LEAST_TENSOR, "tensors", _TENSOR_OBJECTS)
        self.announce(num_pairs, _LEAST_PAIR, "key-value pairs", _PAIR_OBJECTS)
        for _ in range(num_pairs):
            yield self.text("bytes of a key"), self.number(4)

    def number(self, size: int) -> int:
        """Read a whole number of 4 or 8 bytes."""
        return self._unpacked("I" if size == 4 else "Q", size)

    def whole_number(self, kind: int, key: bytes) -> int:
        """Read a value that must be a whole number, whatever its size."""
        if kind not in _WHOLE:
            raise _invalid(f"{key.decode()} of a GGUF file must be a token's id, got a value of kind {kind}")
        return self._unpacked(_WHOLE[kind], _BYTES[kind])

    def text(self, what: str) -> bytes:
        """Read a text."""
        size = self.number(8)
        self.skip(size, 1, what)
        return self._data[self.place - size : self.place]

    def _unpacked(self, code: str, size: int) -> int:
        self.skip(1, size, "number")
        (found,) = struct.unpack_from(self._order + code, self._data, self.place - size)
        return int(found)

    def announce(self, count: int, size: int, what: str, num_objects: int) -> None:
        """Refuse more of something than the file can hold, or than the package can make `num_objects` each of."""
        self.require(count, size, what)
        self._num_objects += count * num_objects
        if self._num_objects > _MOST_OBJECTS:
            raise _invalid(
                f"a GGUF file must say at most {_MOST_OBJECTS} things besides its weights, a text counted as "
                f"{_TEXT_OBJECTS}, got {self._num_objects} with {count} {what}"
            )

    def require(self, count: int, size: int, what: str) -> None:
        """Refuse more of something, of at least `size` bytes each, than what is left of the file can hold."""
        left = len(self._data) - self.place
        if count * size > left:
            raise _invalid(
                f"a GGUF file must hold what it announces, {count} {what} cannot lie in the {left} bytes from byte "
                f"{self.place} on"
            )

    def skip(self, count: int, size: int, what: str) -> None:
        """Pass over something."""
        self.require(count, size, what)
        self.place += count * size

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
        what = "elements of an array"
        if kind in _BYTES:
            self.announce(count, _BYTES[kind], what, 1)
            self.skip(count, _BYTES[kind], what)
            return
        if kind == _STRING:
            self.announce(count, _LEAST_STRING, what, _TEXT_OBJECTS)
        else:
            self.announce(count, _LEAST_ARRAY, what, _ARRAY_OBJECTS)
        for _ in range(count):
            self.skip_value(kind, depth + 1)


def _invalid(message: str) -> InvalidArgument:
    return InvalidArgument(message, reason=Reason.MODEL_INVALID)
