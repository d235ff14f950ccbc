"""Copies that are left where a store takes them from."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pytest

from luthier.errors import InvalidArgument, NotFound, Reason, ResourceExhausted
from luthier.storage import inbox, local_blobs
from luthier.storage.disk import Disk
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
    place = await store.inbox()
    assert place is not None
    return place.mark


async def test_a_copy_that_was_left_becomes_the_blob_and_nothing_else_stays(
    tmp_path: Path, source: Path
) -> None:
    store = LocalBlobStore(tmp_path / "store")
    mark = await marked(store)
    assert await marked(store) == mark, "one for all"
    for _ in range(2):  # a blob that is there stays
        with place_beside(mark) as file:
            assert file is not None
            assert copy_into(file, source)
            blob = await store.take(left(file), expected_digest=DIGEST)
        assert (blob.digest, blob.size_bytes) == (DIGEST, len(BYTES))
    assert await store.read_bytes(DIGEST) == BYTES
    assert list(mark.parent.iterdir()) == [mark]


async def test_a_copy_is_taken_again_once_it_is_a_blob(tmp_path: Path, source: Path) -> None:
    store = LocalBlobStore(tmp_path / "store")
    with place_beside(await marked(store)) as file:
        assert file is not None
        assert copy_into(file, source)
        first = await store.take(left(file), expected_digest=DIGEST)
        assert await store.take(left(file), expected_digest=DIGEST) == first
        with pytest.raises(NotFound, match="there is none; send the bytes instead"):
            await store.take(left(file), expected_digest="0" * 64)


@pytest.mark.parametrize("is_blob", [True, False])
async def test_a_copy_that_goes_while_it_is_taken_is_a_blob_or_not_there(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, is_blob: bool
) -> None:
    def taken_meanwhile(_: IO[bytes], path: Path) -> bool:
        path.unlink()
        return True

    def kept_meanwhile(store: LocalBlobStore, _: IO[bytes], path: Path, digest: str) -> None:
        target = store._reader.path_of(digest)
        target.parent.mkdir()
        path.rename(target)
        path.stat()

    store = LocalBlobStore(tmp_path / "store")
    with place_beside(await marked(store)) as file:
        assert file is not None
        assert copy_into(file, source)
        if is_blob:
            monkeypatch.setattr(LocalBlobStore, "_keep", kept_meanwhile)
            assert (await store.take(left(file), expected_digest=DIGEST)).size_bytes == len(BYTES)
            return
        monkeypatch.setattr(local_blobs, "is_at", taken_meanwhile)
        with pytest.raises(NotFound, match="there is none"):
            await store.take(left(file), expected_digest=DIGEST)


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


@pytest.mark.parametrize("min_free_bytes", [0, 1 << 60])
async def test_what_a_killed_worker_left_goes_while_the_service_runs(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, min_free_bytes: int
) -> None:
    store = LocalBlobStore(tmp_path / "store")
    mark = await marked(store)
    abandoned = mark.with_name("0" * 32)
    abandoned.write_bytes(b"half")
    await store.inbox()
    assert abandoned.exists(), "not at every call"
    monkeypatch.setattr(local_blobs, "_SWEEP_SECONDS", 0.0)
    store._disk.min_free_bytes = min_free_bytes
    with place_beside(mark) as file:
        assert file is not None
        assert copy_into(file, source)
        await store.inbox()
        assert sorted(mark.parent.iterdir()) == sorted([mark, Path(file.name)])


async def test_a_sweep_that_is_refused_does_not_fail_who_asks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = LocalBlobStore(tmp_path / "store")
    monkeypatch.setattr(local_blobs, "_SWEEP_SECONDS", 0.0)
    monkeypatch.setattr(local_blobs, "remove_unlocked", _refused)
    await marked(store)
    assert "what writers left could not be swept" in caplog.text


def test_a_place_that_was_swept_before_it_was_locked_is_not_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = tmp_path / "a.mark"
    mark.touch()
    num_swept = 0

    def sweep(file: IO[bytes], operation: int) -> None:
        nonlocal num_swept
        if num_swept == 0:
            Path(file.name).unlink()
        num_swept += 1
        flock(file, operation)

    flock = fcntl.flock
    monkeypatch.setattr(fcntl, "flock", sweep)
    with place_beside(mark) as file:
        assert file is not None
        assert Path(file.name).exists()
    assert num_swept == 2


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


async def test_who_may_not_look_for_the_mark_has_no_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = await marked(LocalBlobStore(tmp_path / "store"))
    with monkeypatch.context() as patched:
        patched.setattr(Path, "stat", _refused)
        with place_beside(mark) as file:
            assert file is None


async def test_another_users_mark_is_no_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = await marked(LocalBlobStore(tmp_path / "store"))
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with place_beside(mark) as file:
        assert file is None


async def test_where_nothing_is_locked_there_is_no_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LocalBlobStore(tmp_path / "store")
    mark = await marked(store)
    with monkeypatch.context() as patched:
        patched.setattr(fcntl, "flock", _refused)
        with place_beside(mark) as file:
            assert file is None
    assert list(mark.parent.iterdir()) == [mark]


async def test_what_cannot_be_removed_or_closed_does_not_fail_who_left_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LocalBlobStore(tmp_path / "store")
    mark = await marked(store)
    monkeypatch.setattr(Path, "unlink", _refused)
    with place_beside(mark) as file:
        assert file is not None
        os.close(file.fileno())  # so that the block's own close fails


def _refused(*_: Any, **__: Any) -> Any:
    raise PermissionError(errno.EACCES, "not yours")


@pytest.mark.parametrize(
    ("number", "is_copied"), [(errno.EXDEV, True), (errno.EINVAL, True), (errno.EIO, False)]
)
def test_what_the_kernel_does_not_copy_is_copied(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, number: int, is_copied: bool
) -> None:
    monkeypatch.setattr(os, "copy_file_range", refusing(number))
    monkeypatch.setattr(inbox, "_COPY_BYTES", 1 << 20)
    with (tmp_path / "target").open("xb", buffering=0) as file:
        assert copy_into(file, source) is is_copied
    if is_copied:
        assert (tmp_path / "target").read_bytes() == BYTES


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_copy_that_fills_the_disk_says_so(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(os, "copy_file_range", refusing(number))
    with (
        (tmp_path / "target").open("xb", buffering=0) as file,
        pytest.raises(ResourceExhausted, match="the disk is full") as caught,
    ):
        copy_into(file, source)
    assert caught.value.reason == Reason.DISK_FULL


@pytest.mark.parametrize(("more_than_enough", "num_bytes"), [(-1, 0), (0, len(BYTES))])
def test_nothing_is_copied_unless_the_whole_leaves_the_floor_free(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, more_than_enough: int, num_bytes: int
) -> None:
    target = tmp_path / "target"

    def free(_: Disk) -> int:
        return 7 * len(BYTES) + len(BYTES) + more_than_enough - target.stat().st_size

    monkeypatch.setattr(Disk, "free_bytes", free)
    monkeypatch.setattr(inbox, "_COPY_BYTES", 1 << 20)
    with target.open("xb", buffering=0) as file:
        if num_bytes:
            assert copy_into(file, source, 7 * len(BYTES))
        else:
            words = r"21\.0 MiB must stay free beside 3\.0 MiB that are to be written"
            with pytest.raises(ResourceExhausted, match=words) as caught:
                copy_into(file, source, 7 * len(BYTES))
            assert caught.value.reason == Reason.DISK_FULL
    assert target.stat().st_size == num_bytes


def test_a_copy_stops_where_others_fill_the_disk_meanwhile(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = iter([100 << 20, 100 << 20, 5 << 20, 5 << 20])
    monkeypatch.setattr(Disk, "free_bytes", lambda _: next(free))
    monkeypatch.setattr(inbox, "_COPY_BYTES", 1 << 20)
    with (tmp_path / "target").open("xb", buffering=0) as file:
        with pytest.raises(ResourceExhausted, match=r"5\.0 MiB free, and 4\.0 MiB must stay"):
            copy_into(file, source, 4 << 20)
        assert os.fstat(file.fileno()).st_size == 2 << 20


def refusing(number: int) -> Callable[..., int]:
    def refuse(*_: Any) -> int:
        raise OSError(number, os.strerror(number))

    return refuse


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
    await store.put_bytes(BYTES)
    assert (await store.take("a" * 32, expected_digest=DIGEST)).size_bytes == len(BYTES)
