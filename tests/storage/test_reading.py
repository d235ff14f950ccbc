"""Stores that are read and not changed: beside a service that runs, was stopped or was killed."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from sqlalchemy import text

from luthier.errors import FailedPrecondition, InvalidArgument, NotFound, Unavailable
from luthier.storage.opening import StoreUrls, open_readers, open_stores, store_urls

State = dict[str, tuple[int, int, int]]


def state_of(folder: Path) -> State:
    """Inode, size and time of change of all that is below a folder, and of it."""
    found = {str(path): path.stat() for path in (folder, *folder.rglob("*"))}
    return {path: (status.st_ino, status.st_size, status.st_mtime_ns) for path, status in found.items()}


@pytest.fixture(params=["stopped", "running", "killed"])
async def there(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[StoreUrls]:
    """State with one row, one blob and what a writer left that is gone, of a service in one of three states."""
    urls = store_urls(tmp_path / "data")
    stores = open_stores(urls, 0)
    async with stores.database.transaction() as connection:
        await connection.execute(text("CREATE TABLE t (x INTEGER NOT NULL)"))
        await connection.execute(text("INSERT INTO t VALUES (7)"))
    await stores.blobs.put_bytes(b"abc")
    (tmp_path / "data" / "blobs" / "incoming" / "left").write_bytes(b"half")
    if request.param == "stopped":
        await stores.database.close()
    if request.param == "killed":
        shutil.copytree(tmp_path / "data", tmp_path / "killed" / "data")
        urls = store_urls(tmp_path / "killed" / "data")
        assert (tmp_path / "killed" / "data" / "data.db-wal").stat().st_size > 0
    yield urls
    await stores.database.close()


async def test_what_is_there_is_read_and_nothing_is_changed(there: StoreUrls) -> None:
    folder = there.staging.parents[1]
    before = state_of(folder)
    stores = open_readers(there)
    for _ in range(2):
        async with stores.database.reading() as connection:
            assert (await connection.execute(text("SELECT x FROM t"))).scalar_one() == 7
    (listed,) = await stores.blobs.list("", 10)
    assert await stores.blobs.has(listed.digest)
    assert await stores.blobs.size(listed.digest) == 3
    assert await stores.blobs.read_bytes(listed.digest) == b"abc"
    assert [piece async for piece in stores.blobs.read(listed.digest, offset=1, limit=1)] == [b"b"]
    with await stores.blobs.open(listed.digest) as file:
        assert file.read() == b"abc"
    with pytest.raises(NotFound):
        await stores.blobs.size("0" * 64)
    await stores.database.close()
    assert state_of(folder) == before


async def test_a_service_that_starts_while_its_database_is_read_is_told(tmp_path: Path) -> None:
    """It was read as a file that nobody writes: what was seen may be neither what was nor what is."""
    urls = store_urls(tmp_path / "data")
    made = open_stores(urls, 0)
    async with made.database.transaction() as connection:
        await connection.execute(text("CREATE TABLE t (x INTEGER NOT NULL)"))
    await made.database.close()
    stores = open_readers(urls)

    async def read_while_it_starts() -> None:
        async with stores.database.reading(), started.database.transaction() as writing:
            await writing.execute(text("INSERT INTO t VALUES (1)"))

    started = open_stores(urls, 0)
    with pytest.raises(Unavailable, match="its service has started meanwhile; read it again"):
        await read_while_it_starts()
    await stores.database.close()
    await started.database.close()


async def test_a_log_that_cannot_be_read_without_a_change_is_refused(tmp_path: Path) -> None:
    urls = store_urls(tmp_path / "data")
    stores = open_stores(urls, 0)
    async with stores.database.transaction() as connection:
        await connection.execute(text("CREATE TABLE t (x INTEGER NOT NULL)"))
    shutil.copytree(tmp_path / "data", tmp_path / "copy" / "data")
    await stores.database.close()
    os.unlink(tmp_path / "copy" / "data" / "data.db-shm")
    with pytest.raises(
        FailedPrecondition, match=r"cannot be read without changing it: .*start its service once"
    ):
        open_readers(store_urls(tmp_path / "copy" / "data"))


def test_what_is_not_there_is_refused_and_not_made(tmp_path: Path) -> None:
    urls = store_urls(tmp_path / "data")
    with pytest.raises(FailedPrecondition, match=re.escape(f"{tmp_path}/data/blobs must be the folder")):
        open_readers(urls)
    with pytest.raises(InvalidArgument, match="blob store URL must be file:"):
        open_readers(store_urls(tmp_path / "data", blobs_url="s3://bucket"))
    assert list(tmp_path.iterdir()) == []
