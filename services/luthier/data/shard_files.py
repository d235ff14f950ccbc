"""Rows of Parquet shards out of the blob store, a row group at a time. pyarrow is imported when needed."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from luthier.data.shards import Shard
from luthier.data.splits import Split
from luthier.storage.blobs import BlobStore

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet

RECORD_COLUMNS = ("row", "record_id", "split", "filename", "line", "record")
"""Columns of a version's shards; `record` is the canonical record as JSON."""
ROW_COLUMNS = ("row", "record_id", "split", "filename", "line", "input_ids", "loss_mask")
"""Columns of a rendering's shards, besides those of `LENGTH_COLUMNS`."""
LENGTH_COLUMNS = ("row", "split", "num_tokens", "num_supervised")
"""Columns of a rendering's shards that tell its lengths without its tokens."""
CHUNK_BYTES = 1 << 20
"""About the most that one Arrow chunk holds; a single greater row still travels as one."""


class ShardReader:
    """Reads shards of one blob store. Memory: one row group of the columns wanted."""

    def __init__(self, blobs: BlobStore) -> None:
        self._blobs = blobs

    async def batches(
        self,
        shards: Sequence[Shard],
        columns: Sequence[str],
        start_row: int,
        equals: Mapping[str, str | int],
    ) -> AsyncIterator[pyarrow.RecordBatch]:
        """Yield the rows from `start_row` on whose columns have the values of `equals`, as record batches.

        No batch is empty; the columns come in the order asked for. Raises NotFound when a blob is gone.
        """
        loop = asyncio.get_running_loop()
        read = list(dict.fromkeys([*columns, *equals]))
        for shard in shards:
            if shard.first_row + shard.num_rows <= start_row:
                continue
            source = _BlobFile(self._blobs, shard, loop)
            opened, groups = await asyncio.to_thread(_open, source, start_row - shard.first_row)
            for group, skip in groups:
                batch = await asyncio.to_thread(_read_group, opened, group, skip, read, equals)
                if batch is not None:
                    yield batch.select(list(columns))

    async def rows(
        self,
        shards: Sequence[Shard],
        columns: Sequence[str],
        start_row: int,
        equals: Mapping[str, str | int],
    ) -> AsyncIterator[Mapping[str, Any]]:
        """Yield rows as `batches` does, one by one, each by column."""
        async for batch in self.batches(shards, columns, start_row, equals):
            for index in range(batch.num_rows):
                yield batch.slice(index, 1).to_pylist()[0]


def in_split(split: Split | None) -> Mapping[str, str | int]:
    """Return what rows of a split have in common; None: nothing."""
    return {} if split is None else {"split": split.value}


def to_ipc_chunks(batch: pyarrow.RecordBatch, limit_bytes: int = CHUNK_BYTES) -> list[tuple[bytes, int, int]]:
    """Return a batch as complete IPC streams of about `limit_bytes`, each with its first row and row count.

    The batch has a column `row` and at least one row.
    """
    import pyarrow

    if batch.num_rows > 1 and batch.nbytes > limit_bytes:
        half = batch.num_rows // 2
        return [
            *to_ipc_chunks(batch.slice(0, half), limit_bytes),
            *to_ipc_chunks(batch.slice(half), limit_bytes),
        ]
    sink = io.BytesIO()
    with pyarrow.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return [(sink.getvalue(), batch.column("row")[0].as_py(), batch.num_rows)]


class _BlobFile(io.RawIOBase):
    """A blob as a file that can be read from any place. For threads other than the event loop's."""

    def __init__(self, blobs: BlobStore, shard: Shard, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__()
        self._blobs = blobs
        self._shard = shard
        self._loop = loop
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._shard.size_bytes}[whence]
        self._position = origin + offset
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        left = self._shard.size_bytes - self._position
        limit = left if size is None or size < 0 else min(size, left)
        data = asyncio.run_coroutine_threadsafe(self._read(limit), self._loop).result()
        self._position += len(data)
        return data

    async def _read(self, limit: int) -> bytes:
        pieces = self._blobs.read(self._shard.digest, offset=self._position, limit=limit)
        return b"".join([piece async for piece in pieces])


def _open(source: _BlobFile, skip_rows: int) -> tuple[pyarrow.parquet.ParquetFile, list[tuple[int, int]]]:
    """Open a shard; name the row groups that hold wanted rows, and how many rows to skip in each."""
    import pyarrow.parquet

    opened = pyarrow.parquet.ParquetFile(pyarrow.PythonFile(source, mode="r"))
    groups = []
    first = 0
    for index in range(opened.num_row_groups):
        rows = opened.metadata.row_group(index).num_rows
        if first + rows > skip_rows:
            groups.append((index, max(0, skip_rows - first)))
        first += rows
    return opened, groups


def _read_group(
    opened: pyarrow.parquet.ParquetFile,
    group: int,
    skip: int,
    columns: list[str],
    equals: Mapping[str, str | int],
) -> pyarrow.RecordBatch | None:
    import pyarrow.compute

    table = opened.read_row_group(group, columns=columns, use_threads=False).slice(skip)
    for column, value in equals.items():
        table = table.filter(pyarrow.compute.equal(table[column], value))
    batches = table.combine_chunks().to_batches()
    return batches[0] if batches else None
