"""The contract of `Staging`, run on every adapter."""

import asyncio
import hashlib
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from tests.stores import open_blobs, open_staging

from luthier.errors import FailedPrecondition, InvalidArgument, NotFound, OutOfRange, Reason
from luthier.storage.blobs import Blob, BlobStore
from luthier.storage.memory_blobs import MemoryBlobStore, MemoryStaging
from luthier.storage.staging import Staging
from luthier.work.measured_blobs import BlobMetrics, MeasuredStaging

ABSENT = "0" * 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Staged:
    """A place for uploads in progress, and the store that they go to."""

    staging: Staging
    blobs: BlobStore


@pytest.fixture(params=["local", "memory", "measured", "far"])
def staged(request: pytest.FixtureRequest, tmp_path: Path) -> Staged:
    """On `far` the store takes whole objects and is no folder of this machine."""
    blobs: BlobStore = open_blobs(tmp_path / "store")
    if request.param in ("memory", "far"):
        blobs = MemoryBlobStore()
    staging: Staging = open_staging(tmp_path / "staging", blobs)
    if request.param == "memory":
        staging = MemoryStaging(blobs)
    if request.param == "measured":
        staging = MeasuredStaging(staging, BlobMetrics(CollectorRegistry()))
    return Staged(staging=staging, blobs=blobs)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


async def test_stage_appends_where_the_staged_bytes_end(staged: Staged) -> None:
    key = "projects/p/uploads/../u"
    assert await staged.staging.size(key) == 0
    assert await staged.staging.append(key, 0, b"ab") == 2
    assert await staged.staging.append(key, 2, b"c") == 3
    assert await staged.staging.size(key) == 3
    assert await staged.staging.size("another") == 0
    assert await staged.staging.commit(key, expected_digest=sha256(b"abc")) == Blob(
        digest=sha256(b"abc"), size_bytes=3
    )
    assert await staged.blobs.read_bytes(sha256(b"abc")) == b"abc"


@pytest.mark.parametrize("offset", [0, 1, 3, -1])
async def test_stage_at_another_offset_is_refused_and_changes_nothing(staged: Staged, offset: int) -> None:
    await staged.staging.append("k", 0, b"ab")
    with pytest.raises(OutOfRange, match=f"must be the staged size 2, got {offset}") as caught:
        await staged.staging.append("k", offset, b"x")
    assert caught.value.reason == Reason.OFFSET_MISMATCH
    assert await staged.staging.size("k") == 2
    with pytest.raises(OutOfRange):
        await staged.staging.append("nothing there", 1, b"x")
    with pytest.raises(NotFound):
        await staged.staging.commit("nothing there")


async def test_commit_staged_with_another_digest_keeps_the_bytes_until_discarded(staged: Staged) -> None:
    await staged.staging.append("k", 0, b"abc")
    for _ in range(2):
        with pytest.raises(InvalidArgument) as caught:
            await staged.staging.commit("k", expected_digest=ABSENT)
        assert caught.value.reason == Reason.CHECKSUM_MISMATCH
    assert not await staged.blobs.has(sha256(b"abc"))
    assert await staged.staging.size("k") == 3
    await staged.staging.discard("k")
    assert await staged.staging.size("k") == 0


async def test_commit_staged_again_gives_the_same_blob_until_discarded(staged: Staged) -> None:
    await staged.staging.append("k", 0, b"abc")
    first = await staged.staging.commit("k")
    assert await staged.staging.commit("k", expected_digest=first.digest) == first
    assert await staged.staging.size("k") == 3
    with pytest.raises(InvalidArgument, match="sha256"):
        await staged.staging.commit("k", expected_digest=ABSENT)
    with pytest.raises(FailedPrecondition, match="committed"):
        await staged.staging.append("k", 3, b"d")
    await staged.staging.discard("k")
    await staged.staging.discard("k")
    assert await staged.blobs.has(first.digest)
    with pytest.raises(NotFound, match="nothing is staged"):
        await staged.staging.commit("k")
    assert await staged.staging.append("k", 0, b"new") == 3


async def test_commit_staged_of_an_empty_upload_is_the_empty_blob(staged: Staged) -> None:
    assert await staged.staging.append("k", 0, b"") == 0
    assert (await staged.staging.commit("k")).digest == sha256(b"")


async def test_commit_staged_of_bytes_that_are_there_already_gives_that_blob(staged: Staged) -> None:
    blob = await staged.blobs.put_bytes(b"abc")
    await staged.staging.append("k", 0, b"abc")
    assert await staged.staging.commit("k") == blob
    assert await staged.blobs.read_bytes(blob.digest) == b"abc"


async def test_what_was_staged_long_before_is_young_once_it_is_committed(staged: Staged) -> None:
    await staged.staging.append("k", 0, b"abc")
    await asyncio.sleep(0.05)
    since = time.time() - 0.02
    blob = await staged.staging.commit("k")
    await staged.staging.discard("k")
    assert await staged.blobs.collect(blob.digest, since) == 0


async def test_what_is_collected_before_anything_refers_to_it_is_stored_anew(staged: Staged) -> None:
    await staged.staging.append("k", 0, b"abc")
    blob = await staged.staging.commit("k")
    assert await staged.blobs.collect(blob.digest, time.time() + 60) == 3
    assert await staged.staging.size("k") == 3
    assert await staged.staging.commit("k") == blob
    assert await staged.blobs.read_bytes(blob.digest) == b"abc"
