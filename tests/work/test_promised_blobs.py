"""Blobs that a worker was told are there stay until it has named them, or its attempt is over."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select
from tests.stores import open_blobs
from tests.work.checkpoints import FILE, checkpoint_of
from tests.work.collected import collect_later
from tests.work.conftest import Bench

from luthier.errors import FailedPrecondition, InvalidArgument, Reason
from luthier.runtime.auth import TaskTokens
from luthier.storage.blob_refs import blob_refs, task_owner
from luthier.storage.blobs import Blob
from luthier.storage.memory_blobs import MemoryBlobStore
from luthier.work.servicer import WorkerServicer
from luthier.work.tasks import Outcome, Task
from luthier.work.workers import Workers
from luthier.worker.v1 import worker_service_pb2 as W  # noqa: N812

DIGEST = FILE.sha256


async def leased(bench: Bench) -> Task:
    await bench.enqueue()
    task = await bench.claim()
    assert task is not None
    return task


async def kept(bench: Bench) -> list[tuple[str, str]]:
    return [(row["owner"], row["digest"]) for row in await bench.database.rows(select(blob_refs))]


async def test_what_was_promised_stays_until_the_task_ends(bench: Bench, tmp_path: Path) -> None:
    blobs = open_blobs(tmp_path / "blobs")
    task, blob = await leased(bench), await blobs.put_bytes(b"abc")
    for _ in range(2):
        await bench.queue.promised.keep(task.task_id, task.epoch, [blob.digest])
    assert await kept(bench) == [(task_owner(task.task_id), blob.digest)]
    await collect_later(bench.database, blobs)
    assert await blobs.has(blob.digest)
    await bench.queue.finish(task.task_id, task.epoch, Outcome(cancelled=True))
    assert await kept(bench) == []
    await collect_later(bench.database, blobs)
    assert not await blobs.has(blob.digest)


async def test_an_attempt_that_is_lost_lets_it_go(bench: Bench) -> None:
    task = await leased(bench)
    await bench.queue.promised.keep(task.task_id, task.epoch, [DIGEST])
    await bench.queue.release_worker("w", "another process")
    assert await kept(bench) == []
    assert await bench.claim() is not None, "another attempt follows"


async def test_a_checkpoint_that_is_committed_lets_its_own_files_go(bench: Bench) -> None:
    """Else all checkpoints of a job would stay until it ends, whatever it keeps."""
    task, other = await leased(bench), "f" * 64
    await bench.queue.promised.keep(task.task_id, task.epoch, [DIGEST, other])
    await bench.queue.commit_checkpoint(checkpoint_of(task, 1))
    assert await kept(bench) == [(task_owner(task.task_id), other)]


async def test_nothing_is_kept_for_who_lost_the_lease(bench: Bench) -> None:
    task = await leased(bench)
    await bench.queue.finish(task.task_id, task.epoch, Outcome(cancelled=True))
    with pytest.raises(FailedPrecondition) as caught:
        await bench.queue.promised.keep(task.task_id, task.epoch, [DIGEST])
    assert caught.value.reason == Reason.LEASE_LOST
    assert await kept(bench) == []


@pytest.mark.parametrize("wrong", ["", "A" * 64, "../../x", "0" * 63])
async def test_what_is_no_digest_is_refused(bench: Bench, wrong: str) -> None:
    task = await leased(bench)
    with pytest.raises(InvalidArgument, match="must be 64 lowercase hex digits, got"):
        await bench.queue.promised.keep(task.task_id, task.epoch, [DIGEST, wrong])
    assert await kept(bench) == []


class WatchedBlobs(MemoryBlobStore):
    """A store that writes down what was kept whenever it is asked whether it has a blob, or told to store one."""

    def __init__(self, bench: Bench) -> None:
        super().__init__()
        self._bench = bench
        self.kept_then: list[list[str]] = []

    async def has(self, digest: str) -> bool:
        self.kept_then.append([one for _, one in await kept(self._bench)])
        return await super().has(digest)

    async def put(self, chunks: AsyncIterator[bytes], *, expected_digest: str | None = None) -> Blob:
        self.kept_then.append([one for _, one in await kept(self._bench)])
        return await super().put(chunks, expected_digest=expected_digest)


async def test_a_blob_is_kept_before_a_worker_is_told_that_it_is_there_and_before_it_is_stored(
    bench: Bench,
) -> None:
    task, blobs = await leased(bench), WatchedBlobs(bench)
    servicer = WorkerServicer(bench.queue, Workers(bench.queue.metrics), blobs, TaskTokens("s" * 40))
    digest = hashlib.sha256(b"abc").hexdigest()
    context: Any = FarAway()
    wanted = W.GrantBlobRequest(task=task.task_id, epoch=task.epoch, sha256=[digest])
    assert list((await servicer.GrantBlob(wanted, context)).missing_sha256) == [digest]
    assert blobs.kept_then == [[digest]]

    async def sent(data: bytes) -> AsyncIterator[W.PutBlobRequest]:
        sha256 = hashlib.sha256(data).hexdigest()
        yield W.PutBlobRequest(task=task.task_id, epoch=task.epoch, sha256=sha256, data=data)

    blobs.kept_then.clear()
    await servicer.PutBlob(sent(b"not asked for before"), context)
    assert hashlib.sha256(b"not asked for before").hexdigest() in blobs.kept_then[0]


class FarAway:
    """The context of a call from another machine."""

    def peer(self) -> str:
        return "ipv4:10.0.0.1:1"
