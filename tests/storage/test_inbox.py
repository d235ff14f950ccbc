"""Copies that are left where a store takes them from."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path
from typing import IO, Any

import pytest

from luthier.errors import InvalidArgument, NotFound, Reason, ResourceExhausted
from luthier.storage.inbox import copy_into, open_left, place_beside
from luthier.storage.local_blobs import LocalBlobStore
from luthier.storage.memory_blobs import MemoryBlobStore

BYTES = os.urandom(3 << 20) + b"end"
DIGEST = hashlib.sha256(BYTES).hexdigest()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(BYTES)
    return path


def left(file: IO[bytes]) -> str:
    return Path(file.name).name


async def marked(store: LocalBlobStore) -> Path:
    mark = await store.inbox()
    assert mark is not None
    return mark


async def test_a_copy_that_was_left_becomes_the_blob_and_nothing_else_stays(
    tmp_path: Path, source: Path
) -> None:
    store = LocalBlobStore(tmp_path / "store")
    mark = await marked(store)
    assert await store.inbox() == mark, "one for all"
    for _ in range(2):  # a blob that is there stays
        with place_beside(mark) as file:
            assert file is not None
            assert copy_into(file, source)
            blob = await store.take(left(file), expected_digest=DIGEST)
        assert (blob.digest, blob.size_bytes) == (DIGEST, len(BYTES))
    assert await store.read_bytes(DIGEST) == BYTES
    assert list(mark.parent.iterdir()) == [mark]


async def test_a_copy_with_another_digest_is_refused_and_goes_with_its_maker(
    tmp_path: Path, source: Path
) -> None:
    store = LocalBlobStore(tmp_path / "store")
    mark = await marked(store)
    with place_beside(mark) as file:
        assert file is not None
        assert copy_into(file, source)
        with pytest.raises(InvalidArgument, match="sha256 of the bytes must be 0000") as caught:
            await store.take(left(file), expected_digest="0" * 64)
    assert caught.value.reason == Reason.CHECKSUM_MISMATCH
    assert list(mark.parent.iterdir()) == [mark]
    assert not await store.has(DIGEST)


async def test_what_another_process_left_outlives_a_start_and_goes_with_it(
    tmp_path: Path, source: Path
) -> None:
    first = LocalBlobStore(tmp_path / "store")
    mark = await marked(first)
    with place_beside(mark) as file:
        assert file is not None
        assert copy_into(file, source)
        store = LocalBlobStore(tmp_path / "store")
        assert (await store.take(left(file), expected_digest=DIGEST)).size_bytes == len(BYTES)
    abandoned = mark.with_name("0" * 32)
    abandoned.write_bytes(b"half")
    LocalBlobStore(tmp_path / "store")
    assert not abandoned.exists()


@pytest.mark.parametrize("name", ["", "../blobs", "a" * 31, "A" * 32, "a" * 32 + "/x", f"{'a' * 32}.mark"])
def test_a_name_that_leads_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidArgument, match="must be 32 lowercase hex digits, got") as caught:
        open_left(tmp_path, name)
    assert [one.field for one in caught.value.violations] == ["left_in_inbox"]


@pytest.mark.parametrize("kind", ["nothing", "link", "folder", "pipe", "foreign"])
def test_what_is_no_file_of_ones_own_is_not_taken(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    path = tmp_path / ("a" * 32)
    match kind:
        case "link":
            path.symlink_to(source)
        case "folder":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
        case "foreign":
            path.write_bytes(BYTES)
            monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
        case _:
            pass
    with pytest.raises(NotFound, match=r"a file 'a{32}' of this service's own user must be in its inbox"):
        open_left(tmp_path, path.name)


async def test_who_does_not_see_the_mark_has_no_place(tmp_path: Path) -> None:
    store = LocalBlobStore(tmp_path / "store")
    mark = await marked(store)
    with place_beside(mark.with_name("other.mark")) as file:
        assert file is None
    with place_beside(Path("/nowhere") / mark.name) as file:
        assert file is None


async def test_where_nothing_may_be_written_there_is_no_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LocalBlobStore(tmp_path / "store")
    mark = await marked(store)
    monkeypatch.setattr(Path, "open", _refused)
    with place_beside(mark) as file:
        assert file is None


def _refused(*_: Any, **__: Any) -> Any:
    raise PermissionError(errno.EACCES, "not yours")


@pytest.mark.parametrize(
    ("number", "is_copied"), [(errno.EXDEV, True), (errno.EINVAL, True), (errno.ENOSPC, False)]
)
def test_what_the_kernel_does_not_copy_is_copied_and_a_full_disk_is_told(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, number: int, is_copied: bool
) -> None:
    def refuse(*_: Any) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "copy_file_range", refuse)
    with (tmp_path / "target").open("xb", buffering=0) as file:
        assert copy_into(file, source) is is_copied
    if is_copied:
        assert (tmp_path / "target").read_bytes() == BYTES


def test_a_source_that_is_gone_is_not_copied(tmp_path: Path) -> None:
    with (tmp_path / "target").open("xb", buffering=0) as file:
        assert not copy_into(file, tmp_path / "nothing")


async def test_below_the_floor_no_copy_is_asked_for_or_taken(tmp_path: Path, source: Path) -> None:
    store = LocalBlobStore(tmp_path / "store")
    mark = await marked(store)
    full = LocalBlobStore(tmp_path / "store", min_free_bytes=1 << 60)
    assert await full.inbox() is None
    with place_beside(mark) as file:
        assert file is not None
        assert copy_into(file, source)
        with pytest.raises(ResourceExhausted, match="must stay free"):
            await full.take(left(file), expected_digest=DIGEST)


async def test_a_store_in_memory_takes_none() -> None:
    store = MemoryBlobStore()
    assert await store.inbox() is None
    with pytest.raises(NotFound, match="send the bytes instead"):
        await store.take("a" * 32, expected_digest=DIGEST)
