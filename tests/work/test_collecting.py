"""Blobs are given back when nothing needs them, and not a moment before the grace period is over."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from tests.work.collected import collect_later, collector_of, digests_of
from tests.work.conftest import Bench

from luthier.errors import InvalidArgument
from luthier.storage import blob_refs
from luthier.storage.local_blobs import LocalBlobStore
from luthier.work.collecting import GRACE_SECONDS, CollectionMetrics, Collector


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


async def test_what_a_crash_left_that_nothing_ever_named_goes(
    bench: Bench, blobs: LocalBlobStore, tmp_path: Path
) -> None:
    old, young = await blobs.put_bytes(b"old"), await blobs.put_bytes(b"young")
    age(tmp_path, old.digest, GRACE_SECONDS + 1)
    await collector_of(bench.database, blobs).look()
    assert await digests_of(blobs) == {young.digest}


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
    age(tmp_path, loose.digest, GRACE_SECONDS + 1)
    await collector.look()
    assert shown() == (7, 0, 3)


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan")])
def test_a_grace_period_must_be_one(bench: Bench, blobs: LocalBlobStore, seconds: float) -> None:
    with pytest.raises(InvalidArgument, match="blob_grace_seconds must be above 0, got"):
        Collector(bench.database, blobs, CollectionMetrics(CollectorRegistry()), seconds)
