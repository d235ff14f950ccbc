import asyncio
import hashlib
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from luthier.errors import LuthierError
from luthier.storage.files import open_locked
from luthier.storage.local_blobs import LocalBlobStore

ABC = hashlib.sha256(b"abc").hexdigest()


def files(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


async def test_put_writes_the_documented_layout_and_nothing_else(tmp_path: Path) -> None:
    store = LocalBlobStore(tmp_path)
    await store.put_bytes(b"abc")
    await store.put_bytes(b"abc")
    assert files(tmp_path) == {f"blobs/{ABC[:2]}/{ABC}"}


async def test_put_that_fails_or_is_cancelled_leaves_no_file(tmp_path: Path) -> None:
    store = LocalBlobStore(tmp_path)
    started = asyncio.Event()

    async def endless() -> AsyncIterator[bytes]:
        yield b"abc"
        started.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(store.put(endless()))
    await started.wait()
    assert len(files(tmp_path)) == 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    with pytest.raises(LuthierError):
        await store.put(aiter_of(b"abc"), expected_digest="0" * 64)
    assert files(tmp_path) == set()


async def aiter_of(*pieces: bytes) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


def test_start_sweeps_what_a_killed_writer_left_and_spares_a_living_one(tmp_path: Path) -> None:
    LocalBlobStore(tmp_path)
    (tmp_path / "incoming" / "left").write_bytes(b"half")
    with open_locked(tmp_path / "incoming" / "live"):
        LocalBlobStore(tmp_path)
        assert files(tmp_path) == {"incoming/live"}
    LocalBlobStore(tmp_path)
    assert files(tmp_path) == set()


async def test_read_closes_its_file_when_the_reader_stops_early(tmp_path: Path) -> None:
    store = LocalBlobStore(tmp_path)
    blob = await store.put_bytes(b"x" * (3 << 20))
    open_before = len(os.listdir("/proc/self/fd"))
    stream = store.read(blob.digest)
    assert len(await anext(stream)) == 1 << 20
    await stream.aclose()
    assert len(os.listdir("/proc/self/fd")) == open_before


async def test_what_is_no_blob_is_neither_listed_nor_in_the_way(tmp_path: Path) -> None:
    store = LocalBlobStore(tmp_path)
    await store.put_bytes(b"abc")
    folder = tmp_path / "blobs" / ABC[:2]
    for name in (".abcd.X7k2", ".nfs0000", ABC + ".bak", ABC.upper(), "0" * 64):
        (folder / name).write_bytes(b"left")
    (folder / (ABC[:2] + "0" * 62)).mkdir()
    (tmp_path / "blobs" / "lost+found").mkdir()
    (tmp_path / "blobs" / "00").write_bytes(b"a file where a folder would be")
    (tmp_path / "blobs" / "stray").write_bytes(b"a file")
    assert [one.digest for one in await store.list("", 100)] == [ABC]
    assert await store.list(ABC, 100) == []


async def test_a_blob_of_another_user_is_stored_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only who owns a file may set its times."""
    store = LocalBlobStore(tmp_path / "store")
    await store.put_bytes(b"abc")
    target = tmp_path / "store" / "blobs" / ABC[:2] / ABC
    theirs, utime = target.stat().st_ino, os.utime

    def refused(path: Path, *arguments: object) -> None:
        if Path(path).stat().st_ino == theirs:
            raise PermissionError(1, "Operation not permitted", str(path))
        utime(path, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("luthier.storage.local_blobs.os.utime", refused)
    file = tmp_path / "file"
    file.write_bytes(b"abc")
    assert (await store.put_file(file, ABC)).digest == ABC
    assert target.stat().st_ino != theirs
    theirs = target.stat().st_ino
    assert (await store.put_bytes(b"abc")).digest == ABC
    assert target.stat().st_ino != theirs
    assert await store.read_bytes(ABC) == b"abc"
