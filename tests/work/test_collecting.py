"""Blobs are given back when nothing needs them, and not a moment before the grace period is over."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import time
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from sqlalchemy import delete
from tests.work.collected import collect_later, collector_of, digests_of
from tests.work.conftest import Bench
from tests.work.hosted import serve

from luthier.data.config import Config as DataConfig
from luthier.errors import InvalidArgument
from luthier.evaluation.config import Config as EvaluationConfig
from luthier.runtime.auth import TaskTokens
from luthier.runtime.config import read
from luthier.storage import blob_refs
from luthier.storage.blobs import BlobStore
from luthier.storage.local_blobs import LocalBlobStore
from luthier.storage.memory_blobs import MemoryBlobStore
from luthier.training.config import Config as TrainingConfig
from luthier.work.collecting import GRACE_SECONDS, STRAY_SECONDS, CollectionMetrics, Collector, Patience
from luthier.work.servicer import WorkerServicer
from luthier.work.workers import Workers
from luthier.worker.v1 import task_pb2, worker_service_pb2

CONFIGS: dict[str, Any] = {"DATA": DataConfig, "TRAINING": TrainingConfig, "EVALUATION": EvaluationConfig}
NO_CONTEXT: Any = None


@pytest.fixture
def blobs(tmp_path: Path) -> LocalBlobStore:
    return LocalBlobStore(tmp_path / "blobs")


def age(tmp_path: Path, digest: str, seconds: float) -> None:
    """Let a blob have been put some time ago."""
    then = time.time() - seconds
    os.utime(tmp_path / "blobs" / "blobs" / digest[:2] / digest, (then, then))


async def test_what_is_needed_stays_however_old_it_is(bench: Bench, blobs: LocalBlobStore) -> None:
    blob = await blobs.put_bytes(b"needed")
    async with bench.database.transaction() as connection:
        await blob_refs.refer(connection, "u", [blob.digest])
    await collect_later(bench.database, blobs)
    assert await digests_of(blobs) == {blob.digest}


async def test_what_is_let_go_goes_after_the_grace_period(
    bench: Bench, blobs: LocalBlobStore, tmp_path: Path
) -> None:
    blob = await blobs.put_bytes(b"let go")
    age(tmp_path, blob.digest, 10 * GRACE_SECONDS)
    async with bench.database.transaction() as connection:
        await blob_refs.refer(connection, "u", [blob.digest])
        await blob_refs.drop(connection, "u")
    for seconds, is_there in ((0, True), (GRACE_SECONDS - 60, True), (GRACE_SECONDS + 1, False)):
        collector = collector_of(bench.database, blobs, seconds)
        await collector.look()
        await collector.collect_loose()
        assert await blobs.has(blob.digest) == is_there, seconds
    async with bench.database.reading() as connection:
        assert await blob_refs.loose_since(connection, [blob.digest]) == {}


async def test_what_is_let_go_and_needed_again_stays(bench: Bench, blobs: LocalBlobStore) -> None:
    blob = await blobs.put_bytes(b"again")
    async with bench.database.transaction() as connection:
        await blob_refs.refer(connection, "u", [blob.digest])
        await blob_refs.drop(connection, "u")
        await blob_refs.refer(connection, "v", [blob.digest])
    await collect_later(bench.database, blobs)
    assert await blobs.has(blob.digest)
    async with bench.database.transaction() as connection:
        assert await blob_refs.loose_since(connection, [blob.digest]) == {}, "it is not looked at again"
        await blob_refs.drop(connection, "v")
    await collect_later(bench.database, blobs)
    assert not await blobs.has(blob.digest)


async def test_what_a_crash_left_that_nothing_ever_named_goes_a_long_time_after_it_was_found(
    bench: Bench, blobs: LocalBlobStore, tmp_path: Path
) -> None:
    """A database that is new beside blobs, or older than they are, is noticed before its blobs are gone."""
    old, young = await blobs.put_bytes(b"old"), await blobs.put_bytes(b"young")
    age(tmp_path, old.digest, 100 * STRAY_SECONDS)
    for seconds in (0.0, STRAY_SECONDS / 2, STRAY_SECONDS + GRACE_SECONDS - 60):
        await rounds(bench, blobs, seconds)
        assert await digests_of(blobs) == {old.digest, young.digest}, seconds
    await rounds(bench, blobs, STRAY_SECONDS + GRACE_SECONDS + 1)
    assert await digests_of(blobs) == {young.digest}, "it was found later, as it was young"


async def rounds(bench: Bench, blobs: BlobStore, seconds_later: float) -> None:
    """What a service does again and again, which begins with a look."""
    collector = collector_of(bench.database, blobs, seconds_later)
    await collector.look()
    await collector.collect_loose()


@pytest.mark.parametrize(
    ("needs", "stray_seconds", "level", "fate"),
    [(False, 3600.0, "ERROR", "deleted in 1 h"), (True, 0.0, "WARNING", "they stay")],
)
async def test_strays_are_told_of_aloud(
    bench: Bench,
    blobs: LocalBlobStore,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    needs: bool,
    stray_seconds: float,
    level: str,
    fate: str,
) -> None:
    needed, stray = await blobs.put_bytes(b"needed"), await blobs.put_bytes(b"stray")
    age(tmp_path, stray.digest, STRAY_SECONDS)
    if needs:
        async with bench.database.transaction() as connection:
            await blob_refs.refer(connection, "u", [needed.digest])
    patience = Patience(stray_seconds=stray_seconds)
    await Collector(bench.database, blobs, CollectionMetrics(CollectorRegistry()), patience).look()
    (line,) = caplog.records
    assert line.levelname == level
    assert "1 blobs of 5 bytes are there that this database never named" in line.getMessage()
    assert fate in line.getMessage()


async def test_strays_stay_for_ever_where_the_operator_says_so(
    bench: Bench, blobs: LocalBlobStore, tmp_path: Path
) -> None:
    stray = await blobs.put_bytes(b"of another database")
    age(tmp_path, stray.digest, 100 * STRAY_SECONDS)
    for years in (0, 1, 2):
        collector = Collector(
            bench.database,
            blobs,
            CollectionMetrics(CollectorRegistry()),
            Patience(stray_seconds=0),
            clock=lambda: time.time() + years * 31e6,  # noqa: B023
        )
        await collector.look()
        await collector.collect_loose()
    assert await blobs.has(stray.digest)


async def test_a_stray_that_was_needed_and_let_go_has_the_short_time(
    bench: Bench, blobs: LocalBlobStore, tmp_path: Path
) -> None:
    blob = await blobs.put_bytes(b"found first")
    age(tmp_path, blob.digest, STRAY_SECONDS)
    await collector_of(bench.database, blobs).look()
    async with bench.database.transaction() as connection:
        await blob_refs.refer(connection, "u", [blob.digest])
        await blob_refs.drop(connection, "u")
    await rounds(bench, blobs, GRACE_SECONDS + 1)
    assert not await blobs.has(blob.digest)


async def test_what_an_attempt_sent_before_its_rows_existed_is_there_at_its_end(
    bench: Bench, blobs: LocalBlobStore, tmp_path: Path
) -> None:
    """An attempt that runs while the service is upgraded has been promised blobs of which no row says so."""
    await bench.enqueue()
    task = await bench.claim()
    assert task is not None
    blob = await blobs.put_bytes(b"sent before")
    age(tmp_path, blob.digest, STRAY_SECONDS)
    await bench.queue.promised.keep(task.task_id, task.epoch, [blob.digest])
    async with bench.database.transaction() as connection:
        await connection.execute(delete(blob_refs.blob_refs))
    for seconds in (0.0, GRACE_SECONDS + 1, STRAY_SECONDS):
        await rounds(bench, blobs, seconds)
    servicer = WorkerServicer(bench.queue, Workers(bench.queue.metrics), blobs, TaskTokens("s" * 40))
    file = task_pb2.BlobFile(path="weights", sha256=blob.digest, size_bytes=blob.size_bytes)
    result = task_pb2.TaskResult(train=task_pb2.TrainResult(files=[file], step=1))
    await servicer.FinishTask(
        worker_service_pb2.FinishTaskRequest(task=task.task_id, epoch=task.epoch, result=result), NO_CONTEXT
    )
    assert bench.handler.results == [result]


class Stubborn(MemoryBlobStore):
    """A store of which some blobs cannot be collected."""

    def __init__(self) -> None:
        super().__init__()
        self.tried: list[str] = []
        self.stuck: set[str] = set()

    async def collect(self, digest: str, put_before: float) -> int:
        self.tried.append(digest)
        if digest in self.stuck:
            raise PermissionError(errno.EACCES, "of another user", digest)
        return await super().collect(digest, put_before)


async def test_blobs_that_cannot_be_collected_hold_up_no_other_and_are_tried_again(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    blobs = Stubborn()
    digests = [(await blobs.put_bytes(b"%d" % number)).digest for number in range(100)]
    async with bench.database.transaction() as connection:
        await blob_refs.refer(connection, "u", digests)
        await blob_refs.drop(connection, "u")
    blobs.stuck = set(sorted(digests)[:40])
    collector = collector_of(bench.database, blobs, 2 * GRACE_SECONDS)
    await collector.collect_loose()
    assert await digests_of(blobs) == blobs.stuck
    assert len([one for one in caplog.records if "cannot be collected" in one.getMessage()]) == 40
    blobs.tried.clear()
    await collector.collect_loose()
    assert blobs.tried == [], "not again before the next look"
    blobs.stuck.clear()
    await collector.look()
    await collector.collect_loose()
    assert await digests_of(blobs) == set()


async def test_any_number_goes_and_others_write_in_between(bench: Bench, blobs: LocalBlobStore) -> None:
    digests = [(await blobs.put_bytes(b"%d" % number)).digest for number in range(150)]
    async with bench.database.transaction() as connection:
        await blob_refs.refer(connection, "u", digests[:100])
        await blob_refs.drop(connection, "u")
    transactions = 0
    transaction = bench.database.transaction

    def counted(*, makes_room: bool = False) -> object:
        nonlocal transactions
        transactions += 1
        return transaction(makes_room=makes_room)

    bench.database.transaction = counted  # type: ignore[method-assign,assignment]
    await collect_later(bench.database, blobs)
    assert await digests_of(blobs) == set()
    assert transactions >= 150 // 32


async def test_who_writes_does_not_wait_for_what_a_busy_store_does(
    bench: Bench, blobs: LocalBlobStore, tmp_path: Path
) -> None:
    """Collecting happens inside a transaction: it must not queue behind copies and hashes."""
    blob = await blobs.put_bytes(b"let go")
    async with bench.database.transaction() as connection:
        await blob_refs.refer(connection, "u", [blob.digest])
        await blob_refs.drop(connection, "u")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    busy = [asyncio.create_task(blobs.put_file(pipe, "0" * 64)) for _ in range(40)]
    await asyncio.sleep(0.5)
    try:
        async with asyncio.timeout(20):
            await collector_of(bench.database, blobs, 2 * GRACE_SECONDS).collect_loose()
            async with bench.database.transaction() as connection:
                await blob_refs.refer(connection, "v", [blob.digest])
        assert not any(one.done() for one in busy), "all threads of the store were blocked"
    finally:
        descriptor = os.open(pipe, os.O_RDWR)
        await asyncio.gather(*busy, return_exceptions=True)
        os.close(descriptor)
    assert not await blobs.has(blob.digest)


async def test_bytes_that_are_needed_and_loose_are_shown_and_those_that_went_counted(
    bench: Bench, blobs: LocalBlobStore, tmp_path: Path
) -> None:
    registry = CollectorRegistry()
    collector = Collector(bench.database, blobs, CollectionMetrics(registry))

    def shown() -> tuple[float | None, ...]:
        name = "luthier_blob_stored_bytes"
        stored = [registry.get_sample_value(name, {"state": state}) for state in ("needed", "loose")]
        return (*stored, registry.get_sample_value("luthier_blob_collected_bytes_total"))

    needed, loose = await blobs.put_bytes(b"1234567"), await blobs.put_bytes(b"123")
    async with bench.database.transaction() as connection:
        await blob_refs.refer(connection, "u", [needed.digest])
    await collector.look()
    assert shown() == (7, 3, 0)
    async with bench.database.transaction() as connection:
        await blob_refs.note_strays(connection, [loose.digest], 0)
    age(tmp_path, loose.digest, GRACE_SECONDS + 1)
    await collector.collect_loose()
    await collector.look()
    assert shown() == (7, 0, 3)


async def test_a_service_that_runs_collects_by_itself(tmp_path: Path) -> None:
    """What is let go, and what no row ever named: none of these calls collects anything."""
    needed, let_go, stray = b"needed", b"let go" * 10, b"stray" * 100
    async with serve(tmp_path / "home", blob_grace_seconds=0.1, blob_stray_seconds=0.1) as site:
        database, blobs = site.parts.database, site.blobs
        digests = [hashlib.sha256(data).hexdigest() for data in (needed, let_go)]
        async with database.transaction() as connection:
            await blob_refs.refer(connection, "u", digests)
        for data in (needed, let_go, stray):
            await blobs.put_bytes(data)
        assert set(digests) <= await digests_of(blobs)
        async with database.transaction() as connection:
            await blob_refs.refer_instead(connection, "u", digests, digests[:1])

        def collected() -> float | None:
            return site.parts.metrics.registry.get_sample_value("luthier_blob_collected_bytes_total")

        await site.until(lambda: collected() == len(let_go) + len(stray))
        assert await digests_of(blobs) == {digests[0]}


@pytest.mark.parametrize("service", ["DATA", "TRAINING", "EVALUATION"])
@pytest.mark.parametrize("seconds", ["0", "-1", "59", "nan", "inf"])
def test_a_grace_period_must_be_one(service: str, seconds: str) -> None:
    environ = {f"LUTHIER_{service}_BLOB_GRACE_SECONDS": seconds}
    with pytest.raises(InvalidArgument, match=f"finite and at least 60, got {float(seconds):g}"):
        read(CONFIGS[service], section=service, environ=environ)


@pytest.mark.parametrize("service", ["DATA", "TRAINING", "EVALUATION"])
@pytest.mark.parametrize("seconds", ["-1", "899", "nan", "inf"])
def test_the_time_of_strays_must_be_one(service: str, seconds: str) -> None:
    environ = {f"LUTHIER_{service}_BLOB_STRAY_SECONDS": seconds}
    with pytest.raises(InvalidArgument, match=f"0 .never. or finite and at least .*got {float(seconds):g}"):
        read(CONFIGS[service], section=service, environ=environ)
