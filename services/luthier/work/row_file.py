"""A file of rows one after another, then where each begins, to read any page alone.

Layout: the serialized rows in order, then num_rows + 1 offsets of 8 bytes, little-endian: of every row's first byte
and of the end of the last one. What a row holds is not this module's business. Predictions of evaluations and rollouts
of jobs are kept so.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

from luthier.errors import DataLoss, InvalidArgument
from luthier.storage.blobs import BlobStore

_OFFSET_BYTES = 8
_OFFSETS_AT_ONCE = 1 << 13


@dataclass(frozen=True, slots=True, kw_only=True)
class RowFile:
    """A blob that is such a file."""

    sha256: str
    size_bytes: int
    num_rows: int


def write_rows(path: Path, rows: Iterable[bytes]) -> int:
    """Write rows in their order and return how many they were. Memory: one row, and 8 bytes for each."""
    offsets = [0]
    with path.open("wb") as file:
        for row in rows:
            file.write(row)
            offsets.append(offsets[-1] + len(row))
        file.write(struct.pack(f"<{len(offsets)}Q", *offsets))
    return len(offsets) - 1


def count_rows(path: Path) -> int:
    """Return how many rows a file holds, by its size and its last offset. Raises DataLoss for any other file."""
    size_bytes = path.stat().st_size
    with path.open("rb") as file:
        if size_bytes >= _OFFSET_BYTES:
            file.seek(-_OFFSET_BYTES, 2)
            num_bytes = size_bytes - _unpacked(file, 1)[0]
            if num_bytes > 0 and num_bytes % _OFFSET_BYTES == 0:
                return num_bytes // _OFFSET_BYTES - 1
    raise DataLoss(f"{path.name} of {size_bytes} bytes does not end with the offsets of its rows")


def iterate_rows(path: Path) -> Iterator[bytes]:
    """Yield the rows of a file in their order. Memory: one row, and some thousand offsets.

    Raises:
        DataLoss: it is no such file, or its offsets are not in order.
    """
    num_offsets = count_rows(path) + 1
    rows_bytes = path.stat().st_size - _OFFSET_BYTES * num_offsets
    with path.open("rb") as file, path.open("rb") as table:
        table.seek(rows_bytes)
        for begin, end in pairwise(_each(table, num_offsets)):
            if not file.tell() == begin <= end <= rows_bytes:
                raise _disordered(path.name)
            yield file.read(end - begin)


async def found_rows(blobs: BlobStore, sha256: str, num_rows: int, field: str) -> RowFile:
    """Return the file of a blob, after a look at its size and its last offset; errors call it `field`.

    Raises:
        NotFound: there is no such blob.
        InvalidArgument: it cannot hold that many rows.
    """
    size_bytes = await blobs.size(sha256)
    file = RowFile(sha256=sha256, size_bytes=size_bytes, num_rows=num_rows)
    said = await _offsets(blobs, file, num_rows, 1) if num_rows >= 0 and _rows_bytes(file) >= 0 else None
    if said != (_rows_bytes(file),):
        raise InvalidArgument(
            f"{field} must be a file of {num_rows} rows that ends with their offsets, got {size_bytes} bytes that "
            f"are not",
            metadata={"sha256": sha256, "num_rows": str(num_rows)},
        )
    return file


async def read_rows(
    blobs: BlobStore, file: RowFile, first_row: int, limit: int, limit_bytes: int
) -> list[bytes]:
    """Return rows from `first_row` on: at most `limit`, and of those at most what `limit_bytes` hold, but one at least.

    Raises:
        NotFound: the blob is gone.
        DataLoss: its offsets are not in order.
    """
    count = min(limit, file.num_rows - first_row)
    if count <= 0:
        return []
    offsets = await _offsets(blobs, file, first_row, count + 1)
    if list(offsets) != sorted(offsets) or offsets[-1] > _rows_bytes(file):
        raise _disordered(file.sha256)
    fitting = max(1, sum(offset - offsets[0] <= limit_bytes for offset in offsets[1:]))
    begin, end = offsets[0], offsets[fitting]
    data = await _read(blobs, file.sha256, begin, end - begin)
    return [data[first - begin : last - begin] for first, last in pairwise(offsets[: fitting + 1])]


def _rows_bytes(file: RowFile) -> int:
    """Bytes of the rows alone, which is where the offsets begin."""
    return file.size_bytes - _OFFSET_BYTES * (file.num_rows + 1)


async def _offsets(blobs: BlobStore, file: RowFile, first: int, count: int) -> Sequence[int]:
    place = _rows_bytes(file) + _OFFSET_BYTES * first
    data = await _read(blobs, file.sha256, place, _OFFSET_BYTES * count)
    return struct.unpack(f"<{count}Q", data)


async def _read(blobs: BlobStore, sha256: str, offset: int, size_bytes: int) -> bytes:
    return b"".join([piece async for piece in blobs.read(sha256, offset=offset, limit=size_bytes)])


def _each(table: BinaryIO, left: int) -> Iterator[int]:
    while left:
        offsets = _unpacked(table, min(left, _OFFSETS_AT_ONCE))
        left -= len(offsets)
        yield from offsets


def _unpacked(file: BinaryIO, count: int) -> Sequence[int]:
    return struct.unpack(f"<{count}Q", file.read(_OFFSET_BYTES * count))


def _disordered(name: str) -> DataLoss:
    return DataLoss(f"the offsets of the rows of {name} are not in order")
