"""Rows out of shards while others read, too."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from tests.stores import open_blobs

from luthier.data.shard_files import LENGTH_COLUMNS, RECORD_COLUMNS, ROW_COLUMNS, ShardReader
from luthier.data.worker.parquet import RECORD_SCHEMA, ROW_SCHEMA, ShardWriter, WrittenShard
from luthier.errors import Reason, ResourceExhausted
from luthier.runtime.auth import Kind, Principal, set_principal
from luthier.storage.blobs import BlobStore
from luthier.storage.memory_blobs import MemoryBlobStore
from luthier.worker.v1.task_pb2 import BlobFile, Shard

NUM_ROWS = 5000


async def stored(blobs: BlobStore, folder: Path, num_rows: int = NUM_ROWS) -> tuple[Shard, ...]:
    """One shard of records, in several row groups."""
    written: list[WrittenShard] = []
    writer = ShardWriter(folder, "records", RECORD_SCHEMA, written.append)
    for number in range(num_rows):
        place = {"record_id": f"{number:064x}", "split": "TRAIN", "filename": "a.jsonl", "line": number + 1}
        writer.add({**place, "record": f'{{"prompt": "{number}"}}'}, 300)
    writer.close()
    (shard,) = written
    data = shard.path.read_bytes()
    blob = await blobs.put_bytes(data)
    return (
        Shard(
            file=BlobFile(path=shard.path.name, sha256=blob.digest, size_bytes=blob.size_bytes),
            first_row=0,
            num_rows=num_rows,
        ),
    )


async def taken(rows: AsyncIterator[Any], number: int) -> list[int]:
    found = []
    async for row in rows:
        found.append(row["row"])
        if len(found) == number:
            break
    return found


async def test_reads_at_once_never_wait_for_the_threads_that_they_hold(tmp_path: Path) -> None:
    blobs = open_blobs(tmp_path / "store")
    shards = await stored(blobs, tmp_path)
    reader = ShardReader(blobs)
    with ThreadPoolExecutor(2) as few:
        asyncio.get_running_loop().set_default_executor(few)
        reads = [taken(reader.rows(shards, RECORD_COLUMNS, start, {}), 50) for start in range(0, 4800, 400)]
        async with asyncio.timeout(20):
            found = await asyncio.gather(*reads)
            assert await blobs.put_bytes(b"written while others read")
    assert found == [list(range(start, start + 50)) for start in range(0, 4800, 400)]


async def test_reads_beyond_the_limit_are_refused_and_told_when_to_come_again(tmp_path: Path) -> None:
    blobs = MemoryBlobStore()
    shards = await stored(blobs, tmp_path, 10)
    reader = ShardReader(blobs, max_reads=2)
    begun = [reader.rows(shards, RECORD_COLUMNS, 0, {}) for _ in range(2)]
    for rows in begun:
        assert (await anext(rows))["row"] == 0
    with pytest.raises(
        ResourceExhausted, match="at most 2 calls of users may read stored rows at once"
    ) as caught:
        await taken(reader.rows(shards, RECORD_COLUMNS, 0, {}), 1)
    assert caught.value.reason == Reason.OVERLOADED
    assert caught.value.retry_after_seconds == 0.5
    await begun[0].aclose()
    assert await taken(reader.rows(shards, RECORD_COLUMNS, 3, {}), 1) == [3]
    await begun[1].aclose()


@pytest.fixture
def calls_as() -> Iterator[Callable[[Kind], None]]:
    """Say of whom the following calls come."""
    yield lambda kind: set_principal(Principal(kind=kind, subject="s"))
    set_principal(None)


@pytest.mark.parametrize(
    ("crowd", "other", "limit"), [("key", "task", 2), ("task", "key", 1)], ids=["users", "workers"]
)
async def test_users_and_workers_take_no_reads_of_one_another(
    tmp_path: Path, calls_as: Callable[[Kind], None], crowd: Kind, other: Kind, limit: int
) -> None:
    blobs = MemoryBlobStore()
    shards = await stored(blobs, tmp_path, 10)
    reader = ShardReader(blobs, max_reads=2, max_worker_reads=1)
    calls_as(crowd)
    begun = [reader.rows(shards, RECORD_COLUMNS, 0, {}) for _ in range(limit)]
    for rows in begun:
        await anext(rows)
    with pytest.raises(ResourceExhausted, match=f"at most {limit} calls"):
        await taken(reader.rows(shards, RECORD_COLUMNS, 0, {}), 1)
    calls_as(other)
    assert await taken(reader.rows(shards, RECORD_COLUMNS, 3, {}), 1) == [3]
    for rows in begun:
        await rows.aclose()


async def test_rows_that_nobody_wants_to_the_end_close_their_file(tmp_path: Path) -> None:
    blobs = open_blobs(tmp_path / "store")
    shards = await stored(blobs, tmp_path, 10)
    before = set(os.listdir("/proc/self/fd"))
    rows = ShardReader(blobs).rows(shards, RECORD_COLUMNS, 0, {})
    await anext(rows)
    assert len(os.listdir("/proc/self/fd")) > len(before)
    await rows.aclose()
    assert len(os.listdir("/proc/self/fd")) == len(before)


async def test_chunks_hold_the_rows_from_a_row_on_across_shards(tmp_path: Path) -> None:
    blobs = MemoryBlobStore()
    (first,) = await stored(blobs, tmp_path, 3000)
    second = Shard(file=first.file, first_row=3000, num_rows=first.num_rows)
    shards = (first, second)
    chunks = ShardReader(blobs).ipc_chunks(shards, RECORD_COLUMNS, 2999, {"split": "TRAIN"})
    found = [(first_row, num_rows) async for _, first_row, num_rows in chunks]
    assert sum(num_rows for _, num_rows in found) == 3001
    # The second shard repeats the bytes of the first, and with them its row numbers.
    assert [first_row for first_row, _ in found] == [2999, 0, 1024, 2048]


async def test_rows_of_shards_from_before_units_are_units_by_themselves(tmp_path: Path) -> None:
    schema = pyarrow.schema([field for field in ROW_SCHEMA if field.name not in ("unit", "role")])
    written: list[WrittenShard] = []
    writer = ShardWriter(tmp_path, "rows", schema, written.append)
    for number in range(3):
        place = {
            "record_id": "a",
            "split": ("TRAIN", "TEST")[number % 2],
            "filename": "a.jsonl",
            "line": number,
        }
        lengths = {"num_tokens": 2, "num_supervised": 1}
        writer.add({**place, "input_ids": [1, 2], "loss_mask": [False, True], **lengths}, 300)
    writer.close()
    blobs = MemoryBlobStore()
    blob = await blobs.put_bytes(written[0].path.read_bytes())
    shards = (
        Shard(
            file=BlobFile(path="rows", sha256=blob.digest, size_bytes=blob.size_bytes),
            first_row=0,
            num_rows=3,
        ),
    )
    reader = ShardReader(blobs)
    whole = [row async for row in reader.rows(shards, ROW_COLUMNS, 1, {})]
    assert [(row["row"], row["unit"], row["role"]) for row in whole] == [(1, 1, ""), (2, 2, "")]
    told = [row async for row in reader.rows(shards, LENGTH_COLUMNS, 0, {"split": "TRAIN"})]
    assert [row["unit"] for row in told] == [0, 2]
    assert tuple(told[0]) == LENGTH_COLUMNS
