"""Rows of Parquet shards out of the blob store, a row group at a time. pyarrow is imported when needed."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager
from typing import TYPE_CHECKING, Any, BinaryIO, ParamSpec, TypeVar

from luthier.data.splits import split_name
from luthier.errors import ResourceExhausted
from luthier.runtime.auth import current_principal
from luthier.storage.blobs import BlobStore
from luthier.storage.threads import finished_in
from luthier.v1.dataset_pb2 import Split
from luthier.worker.v1.task_pb2 import Shard

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet

RECORD_COLUMNS = ("row", "record_id", "split", "filename", "line", "record")
"""Columns of a version's shards; `record` is the canonical record as JSON."""
ID_COLUMNS = ("row", "record_id")
"""Columns of a version's shards that tell its records without their text."""
ROW_COLUMNS = ("row", "record_id", "split", "filename", "line", "input_ids", "loss_mask", "unit", "role")
"""Columns of a rendering's shards, besides those of `LENGTH_COLUMNS`."""
PROMPT_COLUMNS = (*ROW_COLUMNS, "record")
"""Columns of the shards of a PROMPT rendering, likewise; `record` is the canonical record as JSON."""
LENGTH_COLUMNS = ("row", "split", "num_tokens", "num_supervised", "unit")
"""Columns of a rendering's shards that tell its lengths without its tokens."""
CHUNK_BYTES = 1 << 20
"""About the most that one Arrow chunk holds; a single greater row still travels as one."""
MAX_READS = 48
"""Reads of users in progress, one for each call; every one of them may hold a row group in memory."""
MAX_WORKER_READS = 16
"""Reads on behalf of tasks in progress, besides those of users: neither can take the other's."""
_THREADS = 4
_RETRY_SECONDS = 0.5
P = ParamSpec("P")
R = TypeVar("R")


class ShardReader:
    """Reads shards of one blob store, in a few threads of its own: none of them ever waits for another thread.

    Memory: one row group of the columns wanted for each read in progress, of which there are `max_reads` of users and
    `max_worker_reads` on behalf of tasks at most.
    """

    def __init__(
        self, blobs: BlobStore, *, max_reads: int = MAX_READS, max_worker_reads: int = MAX_WORKER_READS
    ) -> None:
        self._blobs = blobs
        self._most = {"users": max_reads, "workers": max_worker_reads}
        self._reads = Counter[str]()
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="shards")

    async def batches(
        self,
        shards: Sequence[Shard],
        columns: Sequence[str],
        start_row: int,
        equals: Mapping[str, str | int],
    ) -> AsyncGenerator[pyarrow.RecordBatch, None]:
        """Yield the rows from `start_row` on whose columns have the values of `equals`, as record batches.

        No batch is empty; the columns come in the order asked for. Close the iterator when no more is wanted.
        Raises NotFound when a blob is gone, ResourceExhausted OVERLOADED when too many read already.
        """
        read = list(dict.fromkeys([*columns, *equals]))
        async with self._admitted(), aclosing(self._groups(shards, start_row)) as groups:
            async for opened, group, skip in groups:
                batch = await self._run(_read_group, opened, group, skip, read, equals)
                if batch is not None:
                    yield batch.select(list(columns))

    async def rows(
        self,
        shards: Sequence[Shard],
        columns: Sequence[str],
        start_row: int,
        equals: Mapping[str, str | int],
    ) -> AsyncGenerator[Mapping[str, Any], None]:
        """Yield rows as `batches` does, one by one, each by column."""
        async with aclosing(self.batches(shards, columns, start_row, equals)) as batches:
            async for batch in batches:
                for index in range(batch.num_rows):
                    yield batch.slice(index, 1).to_pylist()[0]

    async def ipc_chunks(
        self,
        shards: Sequence[Shard],
        columns: Sequence[str],
        start_row: int,
        equals: Mapping[str, str | int],
    ) -> AsyncGenerator[tuple[bytes, int, int], None]:
        """Yield rows as `batches` does, in the form of `to_ipc_chunks`. The columns have `row` among them."""
        async with aclosing(self.batches(shards, columns, start_row, equals)) as batches:
            async for batch in batches:
                for chunk in await self._run(to_ipc_chunks, batch):
                    yield chunk

    async def _groups(
        self, shards: Sequence[Shard], start_row: int
    ) -> AsyncGenerator[tuple[pyarrow.parquet.ParquetFile, int, int], None]:
        """Yield the row groups that hold rows from `start_row` on, and how many rows to skip in each."""
        wanted = [shard for shard in shards if shard.first_row + shard.num_rows > start_row]
        for shard in wanted:
            with await self._blobs.open(shard.file.sha256) as file:
                opened, groups = await self._run(_open, file, start_row - shard.first_row)
                for group, skip in groups:
                    yield opened, group, skip

    @asynccontextmanager
    async def _admitted(self) -> AsyncIterator[None]:
        principal = current_principal()
        readers = "workers" if principal is not None and principal.kind != "key" else "users"
        most = self._most[readers]
        if self._reads[readers] >= most:
            raise ResourceExhausted(
                f"at most {most} calls of {readers} may read stored rows at once, got one more; call again",
                metadata={"limit": str(most), "readers": readers},
                retry_after_seconds=_RETRY_SECONDS,
            )
        self._reads[readers] += 1
        try:
            yield
        finally:
            self._reads[readers] -= 1

    async def _run(self, function: Callable[P, R], *arguments: P.args, **named: P.kwargs) -> R:
        return await finished_in(self._threads, function, *arguments, **named)


def in_split(split: Split.ValueType) -> Mapping[str, str | int]:
    """Return what rows of a split have in common; unspecified: nothing."""
    return {"split": split_name(split)} if split else {}


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


def _open(file: BinaryIO, skip_rows: int) -> tuple[pyarrow.parquet.ParquetFile, list[tuple[int, int]]]:
    """Open a shard; name the row groups that hold wanted rows, and how many rows to skip in each."""
    import pyarrow.parquet

    opened = pyarrow.parquet.ParquetFile(pyarrow.PythonFile(file, mode="r"))
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

    stored = [column for column in columns if column in opened.schema_arrow.names]
    table = opened.read_row_group(group, columns=stored, use_threads=False).slice(skip)
    # Shards of before units: each row is one by itself.
    if "unit" in columns and "unit" not in stored:
        table = table.append_column("unit", table.column("row"))
    if "role" in columns and "role" not in stored:
        table = table.append_column("role", pyarrow.repeat("", table.num_rows))
    for column, value in equals.items():
        table = table.filter(pyarrow.compute.equal(table[column], value))
    batches = table.combine_chunks().to_batches()
    return batches[0] if batches else None
