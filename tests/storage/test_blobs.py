"""The contract of `BlobStore`, run on every adapter."""

import asyncio
import hashlib
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from luthier.errors import FailedPrecondition, InvalidArgument, NotFound, OutOfRange, Reason
from luthier.storage.blobs import PIECE_BYTES, Blob, BlobStore, ListedBlob
from luthier.storage.local_blobs import LocalBlobStore
from luthier.storage.memory_blobs import MemoryBlobStore
from luthier.work.measured_blobs import BlobMetrics, MeasuredBlobs

ABSENT = "0" * 64


@pytest.fixture(params=["local", "memory", "measured"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> BlobStore:
    if request.param == "memory":
        return MemoryBlobStore()
    local = LocalBlobStore(tmp_path / "store")
    return MeasuredBlobs(local, BlobMetrics(CollectorRegistry())) if request.param == "measured" else local


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


async def pieces(*data: bytes) -> AsyncIterator[bytes]:
    for piece in data:
        yield piece


async def collected(stream: AsyncIterator[bytes]) -> list[bytes]:
    return [piece async for piece in stream]


async def test_put_names_the_blob_by_its_sha256_and_keeps_every_byte(store: BlobStore) -> None:
    blob = await store.put(pieces(b"ab", b"", b"c"))
    assert blob == Blob(digest=sha256(b"abc"), size_bytes=3)
    assert await store.has(blob.digest)
    assert await store.size(blob.digest) == 3
    assert await store.read_bytes(blob.digest) == b"abc"
    assert await store.put_bytes(b"abc") == blob


async def test_put_of_no_bytes_is_the_empty_blob(store: BlobStore) -> None:
    blob = await store.put(pieces())
    assert blob == Blob(digest=sha256(b""), size_bytes=0)
    assert await collected(store.read(blob.digest)) == []


async def test_put_with_another_digest_is_refused_and_leaves_nothing(store: BlobStore) -> None:
    with pytest.raises(InvalidArgument, match="sha256 of the bytes must be 0000") as caught:
        await store.put(pieces(b"abc"), expected_digest=ABSENT)
    assert caught.value.reason == Reason.CHECKSUM_MISMATCH
    assert not await store.has(sha256(b"abc"))
    assert not await store.has(ABSENT)


async def test_put_whose_source_fails_leaves_nothing(store: BlobStore) -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield b"abc"
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        await store.put(broken())
    assert not await store.has(sha256(b"abc"))


async def test_missing_blob_is_not_found(store: BlobStore) -> None:
    assert not await store.has(ABSENT)
    with pytest.raises(NotFound, match=ABSENT):
        await store.size(ABSENT)
    with pytest.raises(NotFound, match=ABSENT):
        await store.read_bytes(ABSENT)
    with pytest.raises(NotFound, match=ABSENT):
        await collected(store.read(ABSENT))


@pytest.mark.parametrize("digest", ["", "abc", "../" + "0" * 61, "A" * 64, "0" * 65, "0" * 63 + "\n"])
async def test_digest_that_is_not_64_hex_digits_is_refused(store: BlobStore, digest: str) -> None:
    for call in (store.has, store.size, store.read_bytes):
        with pytest.raises(InvalidArgument, match="64 lowercase hex digits"):
            await call(digest)


async def test_read_yields_the_range_in_bounded_pieces(store: BlobStore) -> None:
    data = bytes(range(256)) * (PIECE_BYTES // 256 * 2) + b"tail"
    digest = (await store.put_bytes(data)).digest
    whole = await collected(store.read(digest))
    assert [len(piece) for piece in whole] == [PIECE_BYTES, PIECE_BYTES, 4]
    assert b"".join(whole) == data
    assert b"".join(await collected(store.read(digest, offset=5))) == data[5:]
    assert (
        b"".join(await collected(store.read(digest, offset=PIECE_BYTES - 1, limit=2)))
        == (data[PIECE_BYTES - 1 : PIECE_BYTES + 1])
    )
    assert await collected(store.read(digest, offset=len(data))) == []
    assert await collected(store.read(digest, limit=0)) == []


@pytest.mark.parametrize(("offset", "limit"), [(-1, None), (4, None), (0, -1)])
async def test_read_beyond_the_end_is_out_of_range(store: BlobStore, offset: int, limit: int | None) -> None:
    digest = (await store.put_bytes(b"abc")).digest
    with pytest.raises(OutOfRange):
        await collected(store.read(digest, offset=offset, limit=limit))


async def test_stage_appends_where_the_staged_bytes_end(store: BlobStore) -> None:
    key = "projects/p/uploads/../u"
    assert await store.staged_size(key) == 0
    assert await store.stage(key, 0, b"ab") == 2
    assert await store.stage(key, 2, b"c") == 3
    assert await store.staged_size(key) == 3
    assert await store.staged_size("another") == 0
    assert await store.commit_staged(key, expected_digest=sha256(b"abc")) == Blob(
        digest=sha256(b"abc"), size_bytes=3
    )
    assert await store.read_bytes(sha256(b"abc")) == b"abc"


@pytest.mark.parametrize("offset", [0, 1, 3, -1])
async def test_stage_at_another_offset_is_refused_and_changes_nothing(store: BlobStore, offset: int) -> None:
    await store.stage("k", 0, b"ab")
    with pytest.raises(OutOfRange, match=f"must be the staged size 2, got {offset}") as caught:
        await store.stage("k", offset, b"x")
    assert caught.value.reason == Reason.OFFSET_MISMATCH
    assert await store.staged_size("k") == 2
    with pytest.raises(OutOfRange):
        await store.stage("nothing there", 1, b"x")
    with pytest.raises(NotFound):
        await store.commit_staged("nothing there")


async def test_commit_staged_with_another_digest_keeps_the_bytes_until_discarded(store: BlobStore) -> None:
    await store.stage("k", 0, b"abc")
    for _ in range(2):
        with pytest.raises(InvalidArgument) as caught:
            await store.commit_staged("k", expected_digest=ABSENT)
        assert caught.value.reason == Reason.CHECKSUM_MISMATCH
    assert not await store.has(sha256(b"abc"))
    assert await store.staged_size("k") == 3
    await store.discard_staged("k")
    assert await store.staged_size("k") == 0


async def test_commit_staged_again_gives_the_same_blob_until_discarded(store: BlobStore) -> None:
    await store.stage("k", 0, b"abc")
    first = await store.commit_staged("k")
    assert await store.commit_staged("k", expected_digest=first.digest) == first
    assert await store.staged_size("k") == 3
    with pytest.raises(InvalidArgument, match="sha256"):
        await store.commit_staged("k", expected_digest=ABSENT)
    with pytest.raises(FailedPrecondition, match="committed"):
        await store.stage("k", 3, b"d")
    await store.discard_staged("k")
    await store.discard_staged("k")
    assert await store.has(first.digest)
    with pytest.raises(NotFound, match="nothing is staged"):
        await store.commit_staged("k")
    assert await store.stage("k", 0, b"new") == 3


async def test_commit_staged_of_an_empty_upload_is_the_empty_blob(store: BlobStore) -> None:
    assert await store.stage("k", 0, b"") == 0
    assert (await store.commit_staged("k")).digest == sha256(b"")


async def test_commit_staged_of_bytes_that_are_there_already_gives_that_blob(store: BlobStore) -> None:
    blob = await store.put_bytes(b"abc")
    await store.stage("k", 0, b"abc")
    assert await store.commit_staged("k") == blob
    assert await store.read_bytes(blob.digest) == b"abc"


async def test_collect_takes_an_old_blob_away_and_may_be_repeated(store: BlobStore) -> None:
    kept, gone = await store.put_bytes(b"kept"), await store.put_bytes(b"gone, too")
    later = time.time() + 60
    assert [await store.collect(gone.digest, later) for _ in range(2)] == [9, 0]
    assert not await store.has(gone.digest)
    assert await store.read_bytes(kept.digest) == b"kept"
    assert await store.put_bytes(b"gone, too") == gone
    assert await store.has(gone.digest)


async def test_collect_leaves_what_was_put_since(store: BlobStore) -> None:
    blob = await store.put_bytes(b"abc")
    assert await store.collect(blob.digest, time.time() - 60) == 0
    assert await store.has(blob.digest)


async def test_who_puts_takes_or_commits_a_blob_again_makes_it_young(store: BlobStore) -> None:
    """Else it could go between the call that found it there and the row that says that it is needed."""
    blob = await store.put_bytes(b"abc")

    async def by_put() -> Blob:
        return await store.put_bytes(b"abc")

    async def by_take() -> Blob:
        return await store.take("0" * 32, expected_digest=blob.digest)

    async def by_commit() -> Blob:
        await store.stage("k", 0, b"abc")
        return await store.commit_staged("k")

    async def by_the_same_commit() -> Blob:
        return await store.commit_staged("k")

    for again in (by_put, by_take, by_commit, by_the_same_commit):
        before = (await store.list("", 1))[0].put_time
        await asyncio.sleep(0.02)
        assert await again() == blob, again.__name__
        assert (await store.list("", 1))[0].put_time > before, again.__name__


async def test_what_was_staged_long_before_is_young_once_it_is_committed(store: BlobStore) -> None:
    await store.stage("k", 0, b"abc")
    await asyncio.sleep(0.05)
    since = time.time() - 0.02
    blob = await store.commit_staged("k")
    await store.discard_staged("k")
    assert await store.collect(blob.digest, since) == 0


async def test_collect_leaves_what_whoever_commits_again_is_given_again(store: BlobStore) -> None:
    await store.stage("k", 0, b"abc")
    blob = await store.commit_staged("k")
    later = time.time() + 60
    assert await store.collect(blob.digest, later) == 0
    assert await store.commit_staged("k") == blob
    await store.discard_staged("k")
    assert await store.collect(blob.digest, later) == 3


async def test_list_yields_every_blob_in_order_page_by_page(store: BlobStore) -> None:
    sizes = {sha256(b"x" * size): size for size in range(20)}
    for size in range(20):
        await store.put_bytes(b"x" * size)
    found: list[ListedBlob] = []
    after = ""
    while page := await store.list(after, 7):
        found += page
        after = page[-1].digest
    assert [(blob.digest, blob.size_bytes) for blob in found] == sorted(sizes.items())
    assert all(abs(blob.put_time - time.time()) < 60 for blob in found)
    assert await store.list("f" * 64, 7) in ([], ())


async def test_a_read_that_has_begun_sees_the_blob_whole_or_is_told(store: BlobStore) -> None:
    blob = await store.put_bytes(b"x" * (2 * PIECE_BYTES))
    reading = store.read(blob.digest)
    first = await anext(reading)
    await store.collect(blob.digest, time.time() + 60)
    assert len(first + b"".join([piece async for piece in reading])) == 2 * PIECE_BYTES


async def test_open_gives_a_file_that_reads_from_any_place(store: BlobStore) -> None:
    blob = await store.put_bytes(b"0123456789")
    with await store.open(blob.digest) as file:
        assert file.seekable()
        file.seek(7)
        assert file.read() == b"789"
        file.seek(-9, os.SEEK_END)
        assert file.read(2) == b"12"
    with pytest.raises(NotFound, match=ABSENT):
        await store.open(ABSENT)
