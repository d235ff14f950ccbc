"""Bytes of dropped checkpoints: given back when nothing names them, and not before."""

from __future__ import annotations

from typing import Any

from tests.training.conftest import stored
from tests.work.checkpoints import checkpoint_of

from luthier.training.jobs import repository
from luthier.training.jobs.released import GRACE_SECONDS, ReleasedBlobs
from luthier.worker.v1 import task_pb2


class Clock:
    """Seconds that a test moves."""

    def __init__(self) -> None:
        self.now = 1e9

    def __call__(self) -> float:
        return self.now


async def test_sweep_deletes_what_nothing_names_once_the_grace_is_over(bench: Any) -> None:
    clock = Clock()
    released = ReleasedBlobs(bench.database, bench.blobs, clock)
    gone = await bench.blobs.put_bytes(b"gone")
    async with bench.database.transaction() as connection:
        await released.release(connection, [gone.digest, gone.digest])
    clock.now += GRACE_SECONDS - 1
    await released.sweep()
    assert await bench.blobs.has(gone.digest)
    clock.now += 2
    await released.sweep()
    assert not await bench.blobs.has(gone.digest)


async def test_one_sweep_deletes_any_number(bench: Any) -> None:
    clock = Clock()
    released = ReleasedBlobs(bench.database, bench.blobs, clock)
    gone = [await bench.blobs.put_bytes(b"step %d" % step) for step in range(150)]
    async with bench.database.transaction() as connection:
        await released.release(connection, [blob.digest for blob in gone])
    clock.now += GRACE_SECONDS + 1
    await released.sweep()
    assert not any([await bench.blobs.has(blob.digest) for blob in gone])


async def test_sweep_keeps_what_a_checkpoint_or_a_model_names(bench: Any) -> None:
    clock = Clock()
    released = ReleasedBlobs(bench.database, bench.blobs, clock)
    model = await bench.add_model("projects/default/models/named")
    await bench.create("one")
    task, _ = await bench.claim()
    blob = await bench.blobs.put_bytes(b"the state of step 1")
    file = task_pb2.BlobFile(path="a", sha256=blob.digest, size_bytes=blob.size_bytes)
    await bench.queue.commit_checkpoint(checkpoint_of(task, 1, [file]))
    named = [blob.digest, *(file.sha256 for file in model.private.files)]
    async with bench.database.transaction() as connection:
        await released.release(connection, named)
    clock.now += GRACE_SECONDS + 1
    await released.sweep()
    for digest in named:
        assert await bench.blobs.has(digest)


async def test_sweep_keeps_what_a_job_begins_from_until_it_has_ended(bench: Any) -> None:
    clock = Clock()
    released = ReleasedBlobs(bench.database, bench.blobs, clock)
    job = await bench.create("one")
    start = await stored(bench, "the weights of a checkpoint that is dropped")
    async with bench.database.transaction() as connection:
        found = await bench.jobs.family.get(connection, job.name)
        private = found.copy_private()
        private.start_files.append(start)
        await repository.jobs().update(connection, found, found.copy(), private)
        await released.release(connection, [start.sha256])
    clock.now += GRACE_SECONDS + 1
    await released.sweep()
    assert await bench.blobs.has(start.sha256)
    await bench.cancel(job.name)
    async with bench.database.transaction() as connection:
        await released.release(connection, [start.sha256])
    clock.now += GRACE_SECONDS + 1
    await released.sweep()
    assert not await bench.blobs.has(start.sha256)


async def test_a_dropped_checkpoint_releases_its_own_bytes_alone(bench: Any) -> None:
    """What older and newer checkpoints share stays."""
    await bench.create("one", max_checkpoints=1)
    task, _ = await bench.claim()
    shared = await bench.blobs.put_bytes(b"the same in all")
    states = []
    for step in (1, 2, 3):
        states.append(await bench.blobs.put_bytes(b"state %d" % step))
        files = [
            task_pb2.BlobFile(path=path, sha256=blob.digest, size_bytes=blob.size_bytes)
            for path, blob in (("config", shared), ("state", states[-1]))
        ]
        await bench.queue.commit_checkpoint(checkpoint_of(task, step, files))
    clock = Clock()
    clock.now = 1e11
    await ReleasedBlobs(bench.database, bench.blobs, clock).sweep()
    assert [await bench.blobs.has(blob.digest) for blob in states] == [False, False, True]
    assert await bench.blobs.has(shared.digest)
