"""The file of an evaluation's predictions: rows one after another, then where each begins, to read any page alone.

Layout: the serialized rows in order, then num_rows + 1 offsets of 8 bytes, little-endian: of every row's first byte
and of the end of the last one. What a row holds is not this module's business.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

from luthier.errors import DataLoss, InvalidArgument
from luthier.storage.blobs import BlobStore
from luthier.stored.v1.evaluation_pb2 import PredictionFile

_OFFSET_BYTES = 8


def write_predictions(path: Path, rows: Iterable[bytes]) -> int:
    """Write rows in their order and return how many they were. Memory: one row, and 8 bytes for each."""
    offsets = [0]
    with path.open("wb") as file:
        for row in rows:
            file.write(row)
            offsets.append(offsets[-1] + len(row))
        file.write(struct.pack(f"<{len(offsets)}Q", *offsets))
    return len(offsets) - 1


async def found_predictions(blobs: BlobStore, sha256: str, num_rows: int) -> PredictionFile:
    """Return the file of a blob, after a look at its size and its last offset.

    Raises:
        NotFound: there is no such blob.
        InvalidArgument: it cannot hold that many rows.
    """
    size_bytes = await blobs.size(sha256)
    file = PredictionFile(sha256=sha256, size_bytes=size_bytes, num_rows=num_rows)
    said = await _offsets(blobs, file, num_rows, 1) if num_rows >= 0 and _rows_bytes(file) >= 0 else None
    if said != (_rows_bytes(file),):
        raise InvalidArgument(
            f"predictions must be a file of {num_rows} rows that ends with their offsets, got {size_bytes} bytes that "
            f"are not",
            metadata={"sha256": sha256, "num_records": str(num_rows)},
        )
    return file


async def read_predictions(
    blobs: BlobStore, file: PredictionFile, first_row: int, limit: int, limit_bytes: int
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
        raise DataLoss(f"the offsets of the predictions {file.sha256} are not in order")
    fitting = max(1, sum(offset - offsets[0] <= limit_bytes for offset in offsets[1:]))
    begin, end = offsets[0], offsets[fitting]
    data = await _read(blobs, file.sha256, begin, end - begin)
    return [data[first - begin : last - begin] for first, last in pairwise(offsets[: fitting + 1])]


def _rows_bytes(file: PredictionFile) -> int:
    """Bytes of the rows alone, which is where the offsets begin."""
    return file.size_bytes - _OFFSET_BYTES * (file.num_rows + 1)


async def _offsets(blobs: BlobStore, file: PredictionFile, first: int, count: int) -> Sequence[int]:
    place = _rows_bytes(file) + _OFFSET_BYTES * first
    data = await _read(blobs, file.sha256, place, _OFFSET_BYTES * count)
    return struct.unpack(f"<{count}Q", data)


async def _read(blobs: BlobStore, sha256: str, offset: int, size_bytes: int) -> bytes:
    return b"".join([piece async for piece in blobs.read(sha256, offset=offset, limit=size_bytes)])
