"""A blob store that is measured is the store within, and says how long it took and what it could not do."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from luthier.errors import NotFound, ResourceExhausted
from luthier.storage.blobs import BlobStore
from luthier.storage.local_blob_reader import LocalBlobReader
from luthier.storage.local_blobs import LocalBlobStore
from luthier.storage.local_staging import LocalStaging
from luthier.storage.staging import Staging
from luthier.work.measured_blobs import BlobMetrics, MeasuredBlobs, MeasuredStaging


class Measured:
    """A store in a folder, and what is said of it."""

    def __init__(self, folder: Path, *, min_free_bytes: int = 0) -> None:
        self.registry = CollectorRegistry()
        store = LocalBlobStore(folder, min_free_bytes=min_free_bytes)
        metrics = BlobMetrics(self.registry)
        self.store: BlobStore = MeasuredBlobs(store, metrics)
        self.staging: Staging = MeasuredStaging(LocalStaging(folder / "staging", store), metrics)

    def value(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(name, labels) or 0.0

    def failures(self, operation: str) -> dict[str, float]:
        return {
            sample.labels["reason"]: sample.value
            for family in self.registry.collect()
            for sample in family.samples
            if sample.name == "luthier_blob_failures_total"
            and sample.labels["operation"] == operation
            and sample.value
        }


@pytest.fixture
def measured(tmp_path: Path) -> Measured:
    return Measured(tmp_path / "store")


async def test_times_and_bytes_are_counted(measured: Measured) -> None:
    blob = await measured.store.put_bytes(b"abc")
    assert b"".join([piece async for piece in measured.store.read(blob.digest)]) == b"abc"
    assert await measured.store.read_bytes(blob.digest) == b"abc"
    await measured.staging.append("k", 0, b"defg")
    await measured.staging.commit("k")
    assert await measured.store.collect(blob.digest, time.time() + 60) == 3
    for operation, size in (("write", 3.0), ("read", 6.0), ("append", 4.0)):
        assert measured.value("luthier_blob_bytes_total", operation=operation) == size
    for operation, times in (
        ("write", 1.0),
        ("read", 2.0),
        ("append", 1.0),
        ("commit", 1.0),
        ("delete", 1.0),
    ):
        assert measured.value("luthier_blob_operation_seconds_count", operation=operation) == times


async def test_waiting_for_the_other_end_is_not_the_stores_time(measured: Measured) -> None:
    async def slow() -> AsyncIterator[bytes]:
        for piece in (b"a", b"b"):
            await asyncio.sleep(0.15)
            yield piece

    blob = await measured.store.put(slow())
    async for _ in measured.store.read(blob.digest):
        await asyncio.sleep(0.3)
    for operation in ("write", "read"):
        assert measured.value("luthier_blob_operation_seconds_sum", operation=operation) < 0.2


async def test_what_the_caller_did_wrong_is_no_failure(measured: Measured) -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield b"a"
        raise RuntimeError("the caller went away")

    with pytest.raises(NotFound):
        await measured.store.size("0" * 64)
    with pytest.raises(RuntimeError):
        await measured.store.put(broken())
    assert measured.failures("look") == measured.failures("write") == {}


async def test_what_the_store_cannot_do_is_counted_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = Measured(tmp_path / "full", min_free_bytes=1 << 60)
    with pytest.raises(ResourceExhausted):
        await full.store.put_bytes(b"a")
    assert full.failures("write") == {"DISK_FULL": 1.0}

    broken = Measured(tmp_path / "broken")
    blob = await broken.store.put_bytes(b"a")

    def fail(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(LocalBlobReader, "size_of", fail)
    with pytest.raises(OSError, match="Input/output"):
        await broken.store.size(blob.digest)
    assert broken.failures("look") == {"INTERNAL": 1.0}
