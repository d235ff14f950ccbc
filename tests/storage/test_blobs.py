"""The contract of `BlobStore`, run on every adapter."""

import asyncio
import hashlib
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from tests.stores import open_blobs

from luthier.errors import InvalidArgument, NotFound, OutOfRange, Reason
from luthier.storage.blobs import PIECE_BYTES, Blob, BlobStore, ListedBlob, Owner
from luthier.storage.memory_blobs import MemoryBlobStore
from luthier.work.measured_blobs import BlobMetrics, MeasuredBlobs

ABSENT = "0" * 64


@pytest.fixture(params=["opened", "memory", "measured"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> BlobStore:
    if request.param == "memory":
        return MemoryBlobStore()
    opened = open_blobs(tmp_path / "store")
    return MeasuredBlobs(opened, BlobMetrics(CollectorRegistry())) if request.param == "measured" else opened


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


async def test_who_puts_or_takes_a_blob_again_makes_it_young(store: BlobStore, tmp_path: Path) -> None:
    """Else it could go between the call that found it there and the row that says that it is needed."""
    blob = await store.put_bytes(b"abc")
    (tmp_path / "file").write_bytes(b"abc")

    async def by_put() -> Blob:
        return await store.put_bytes(b"abc")

    async def by_take() -> Blob:
        return await store.take("0" * 32, expected_digest=blob.digest)

    async def by_file() -> Blob:
        return await store.put_file(tmp_path / "file", blob.digest)

    async def by_a_file_that_is_gone() -> Blob:
        return await store.put_file(tmp_path / "gone", blob.digest)

    for again in (by_put, by_take, by_file, by_a_file_that_is_gone):
        before = (await store.list("", 1))[0].put_time
        await asyncio.sleep(0.02)
        assert await again() == blob, again.__name__
        assert (await store.list("", 1))[0].put_time > before, again.__name__


async def test_put_file_stores_a_file_that_stays_and_is_young_however_old_it_is(
    store: BlobStore, tmp_path: Path
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    os.utime(path, (0, 0))
    blob = await store.put_file(path, sha256(b"abc"))
    assert blob == Blob(digest=sha256(b"abc"), size_bytes=3)
    assert await store.read_bytes(blob.digest) == path.read_bytes() == b"abc"
    assert await store.collect(blob.digest, time.time() - 60) == 0
    assert await store.collect(blob.digest, time.time() + 60) == 3
    assert path.read_bytes() == b"abc"


async def test_put_file_of_a_file_that_is_gone_is_not_found(store: BlobStore, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=ABSENT):
        await store.put_file(tmp_path / "gone", ABSENT)
    with pytest.raises(InvalidArgument, match="must be 64 lowercase hex digits"):
        await store.put_file(tmp_path / "gone", "abc")


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


async def test_a_store_is_the_first_s_who_says_so(store: BlobStore) -> None:
    assert await store.owner() is None
    first = Owner(service="data", database_id="a" * 32)
    other = Owner(service="training", database_id="b" * 32)
    assert await store.own(first) == first
    assert await store.own(other) == first
    assert await store.owner() == first
    assert list(await store.list("", 10)) == [], "no mark is a blob"
