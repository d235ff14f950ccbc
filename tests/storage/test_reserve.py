"""The room for cancelling on a full disk: kept from one run to the next, and never taken for a log of writes."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from sqlalchemy import text
from tests.small_disk import fill, taken

from luthier.errors import ResourceExhausted
from luthier.storage.database import Database
from luthier.storage.dialect import RESERVED_BYTES, url_of
from luthier.storage.disk import Disk
from luthier.storage.migrations import upgrade
from luthier.storage.opening import open_database
from luthier.storage.reading import DatabaseReader

ROWS = 20
DATABASE, LOG, INDEX = "a.db", "a.db-wal", "a.db-shm"
KEPT_LOG, KEPT_INDEX = "a.db-kept-wal", "a.db-kept-shm"


def open_in(folder: Path) -> Database:
    return open_database(url_of(folder / DATABASE))


async def opened(folder: Path) -> Database:
    database = open_in(folder)
    await database.reserve()
    return database


async def write(database: Database, value: int) -> None:
    """Have this value in every row, and one more transaction in the log."""
    async with database.transaction(makes_room=True) as connection:
        await connection.execute(text("UPDATE t SET value = :value"), {"value": value})


async def made(folder: Path, value: int = 0) -> Database:
    """A database with rows that have a value, in use, with its room."""
    database = await opened(folder)
    async with database.transaction() as connection:
        await connection.execute(text("CREATE TABLE IF NOT EXISTS t (id INTEGER PRIMARY KEY, value INTEGER)"))
        for number in range(ROWS):
            await connection.execute(text("INSERT INTO t VALUES (:n, :v)"), {"n": number, "v": value})
    return database


async def require(database: Database, value: int) -> None:
    """See that it is whole, and that every row has a value."""
    (checked,) = await database.rows(text("PRAGMA integrity_check"))
    assert checked["integrity_check"] == "ok"
    found = [row["value"] for row in await database.rows(text("SELECT value FROM t ORDER BY id"))]
    assert found == [value] * ROWS


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.name.startswith(DATABASE)}


def as_it_is(folder: Path, copy: Path) -> Path:
    """What a process that is killed just now leaves, as a folder of its own."""
    # By another process: this one's locks on a file would go with its descriptor.
    subprocess.run(["cp", "-a", str(folder), str(copy)], check=True)
    return copy


async def test_what_is_kept_is_no_log_and_is_the_next_runs_log(folder: Path) -> None:
    first = await made(folder)
    await write(first, 1)
    inode = (folder / LOG).stat().st_ino
    await first.close()
    assert names(folder) == {DATABASE, KEPT_LOG, KEPT_INDEX}
    for name in (KEPT_LOG, KEPT_INDEX):
        assert (folder / name).stat().st_nlink == 1
        assert (folder / name).read_bytes()[:4096] == bytes(4096)
    assert (folder / KEPT_LOG).stat().st_size == RESERVED_BYTES
    second = await opened(folder)
    assert (folder / LOG).stat().st_ino == inode
    assert names(folder) == {DATABASE, LOG, INDEX}
    await require(second, 1)
    await write(second, 2)
    assert (folder / LOG).stat().st_size == RESERVED_BYTES
    await second.close()
    third = await opened(folder)
    await require(third, 2)
    await third.close()


async def test_a_log_that_grew_is_kept_at_its_size(folder: Path) -> None:
    database = await made(folder)
    async with database.transaction() as connection:
        await connection.execute(text("CREATE TABLE big AS SELECT zeroblob(9 * 1024 * 1024) AS data"))
    assert (folder / LOG).stat().st_size > 9 << 20
    await database.close()
    assert (folder / KEPT_LOG).stat().st_size == RESERVED_BYTES


async def test_a_migration_in_between_leaves_the_room(folder: Path) -> None:
    """It has a connection of its own, which would be the last one of all."""
    await (await made(folder)).close()
    database = await opened(folder)
    inode = (folder / LOG).stat().st_ino
    upgrade(url_of(folder / DATABASE), [])
    assert (folder / LOG).stat().st_ino == inode
    await database.close()


async def test_a_start_on_a_full_disk_has_its_room_whoever_waits_for_it(small: Path) -> None:
    """Stopped and started again and again: no byte is free in between."""
    await (await made(small, 1)).close()
    database = await opened(small)
    fill(small)
    with taken(small):
        for value in range(2, 6):
            await database.close()
            assert names(small) == {DATABASE, KEPT_LOG, KEPT_INDEX}
            database = await opened(small)
            await require(database, value - 1)
            for _ in range(100):
                await write(database, value)
            assert Disk(small).free_bytes() == 0
    await database.close()


_KILLED = f"""
import asyncio, os, pathlib, sys
from tests.storage.test_reserve import made, write

async def main():
    database = await made(pathlib.Path(sys.argv[1]))
    for value in range(1, 8):
        await write(database, value)
    os.kill(os.getpid(), {int(signal.SIGKILL)})

asyncio.run(main())
"""


def killed(folder: Path) -> None:
    """Have a process make a database with 7 in every row, and be killed."""
    ended = subprocess.run([sys.executable, "-c", _KILLED, str(folder)], check=False)
    assert ended.returncode == -signal.SIGKILL


async def test_a_start_after_a_kill_has_its_room_on_a_full_disk(small: Path) -> None:
    killed(small)
    assert names(small) == {DATABASE, LOG, INDEX}
    fill(small)
    with taken(small):
        database = await opened(small)
        await require(database, 7)
        for _ in range(300):
            await write(database, 8)
        await database.close()
        database = await opened(small)
        await require(database, 8)
    await database.close()


async def test_what_an_index_tells_of_another_log_is_not_believed(folder: Path, small: Path) -> None:
    """As one from before a power cut, on a full disk, where SQLite is kept from making it anew."""
    database = await made(folder)
    as_it_is(folder, small / "old")
    await write(database, 1)
    copy = as_it_is(folder, small / "cut")
    os.replace(small / "old" / INDEX, copy / INDEX)
    await database.close()
    fill(small)
    again = await opened(copy)
    await require(again, 1)
    await again.close()


async def test_what_makes_no_room_gets_none(small: Path) -> None:
    await (await made(small, 1)).close()
    fill(small)
    database = await opened(small)
    with pytest.raises(ResourceExhausted, match="what is left is for cancelling"):
        async with database.transaction():
            pass
    await database.close()


async def test_without_room_at_the_first_start_there_is_none(small: Path) -> None:
    fill(small, leave_bytes=2 << 20)
    database = open_in(small)
    with pytest.raises(ResourceExhausted):
        await database.reserve()
    await database.close()
    assert names(small) == {DATABASE}


async def test_a_kill_between_the_names_and_the_close_loses_nothing(folder: Path, tmp_path: Path) -> None:
    database = await made(folder)
    await write(database, 1)
    os.link(folder / LOG, folder / KEPT_LOG)
    os.link(folder / INDEX, folder / KEPT_INDEX)
    copy = as_it_is(folder, tmp_path / "killed")
    await database.close()
    again = await opened(copy)
    assert names(copy) == {DATABASE, LOG, INDEX}
    await require(again, 1)
    await again.close()


async def test_a_kill_before_the_log_is_made_none_brings_nothing_old_back(
    folder: Path, tmp_path: Path
) -> None:
    """SQLite has deleted it: what is kept is a log in all but its name, of rows that have changed since."""
    database = await made(folder)
    await write(database, 1)
    copy = as_it_is(folder, tmp_path / "old")
    await write(database, 2)
    await database.close()
    os.replace(copy / LOG, folder / KEPT_LOG)
    os.replace(copy / INDEX, folder / KEPT_INDEX)
    again = await opened(folder)
    await require(again, 2)
    await write(again, 3)
    copy = as_it_is(folder, tmp_path / "killed")
    await again.close()
    last = await opened(copy)
    await require(last, 3)
    await last.close()


@pytest.mark.parametrize("name", [LOG, INDEX])
async def test_a_kill_while_the_names_are_given_back_loses_nothing(
    folder: Path, tmp_path: Path, name: str
) -> None:
    await (await made(folder, 1)).close()
    os.link(folder / KEPT_LOG, folder / LOG)
    if name == INDEX:
        os.unlink(folder / KEPT_LOG)
        os.link(folder / KEPT_INDEX, folder / INDEX)
    database = await opened(folder)
    assert names(folder) == {DATABASE, LOG, INDEX}
    await require(database, 1)
    await write(database, 2)
    copy = as_it_is(folder, tmp_path / "killed")
    await database.close()
    again = await opened(copy)
    await require(again, 2)
    await again.close()


async def test_a_log_that_is_there_is_never_replaced(folder: Path, tmp_path: Path) -> None:
    database = await made(folder)
    await write(database, 1)
    copy = as_it_is(folder, tmp_path / "killed")
    await database.close()
    shutil.copy(folder / KEPT_LOG, copy / KEPT_LOG)
    inode = (copy / LOG).stat().st_ino
    again = await opened(copy)
    assert (copy / LOG).stat().st_ino == inode
    assert names(copy) == {DATABASE, LOG, INDEX}
    await require(again, 1)
    await again.close()


async def test_a_log_that_another_one_uses_stays_a_log_and_is_kept_in_the_end(
    folder: Path, tmp_path: Path
) -> None:
    """Another process, or a connection that somebody here still has."""
    first, second = await made(folder), open_in(folder)
    await write(second, 1)
    await first.close()
    assert (folder / LOG).samefile(folder / KEPT_LOG)
    await write(second, 2)
    copy = as_it_is(folder, tmp_path / "killed")
    inode = (folder / LOG).stat().st_ino
    await second.close()
    assert names(folder) == {DATABASE, KEPT_LOG, KEPT_INDEX}
    for found in (folder, copy):
        again = await opened(found)
        assert names(found) == {DATABASE, LOG, INDEX}
        await require(again, 2)
        assert found == copy or (folder / LOG).stat().st_ino == inode
        await again.close()


async def test_a_file_system_without_second_names_keeps_nothing_and_says_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)
    database = await made(folder, 1)
    await database.close()
    assert names(folder) == {DATABASE}
    assert "no room is kept for a start on a full disk: [Errno 1]" in caplog.text
    again = await opened(folder)
    await require(again, 1)
    assert (folder / LOG).stat().st_size > RESERVED_BYTES
    await again.close()


async def test_a_copy_without_its_zeros_is_no_room(folder: Path) -> None:
    await (await made(folder, 1)).close()
    os.truncate(folder / KEPT_LOG, 0)
    os.truncate(folder / KEPT_LOG, RESERVED_BYTES)
    database = await opened(folder)
    assert (folder / LOG).stat().st_blocks * 512 >= RESERVED_BYTES
    await require(database, 1)
    await database.close()


async def test_who_wants_no_room_gets_back_what_was_kept(folder: Path) -> None:
    await (await made(folder, 1)).close()
    database = open_in(folder)
    await database.forgo_reserve()
    assert names(folder) == {DATABASE}
    await database.close()


@pytest.mark.parametrize("is_put_back", [False, True])
async def test_room_is_nothing_that_a_quiet_reader_lacks(folder: Path, is_put_back: bool) -> None:
    """Neither beside a database whose service is stopped, nor as the log of one that was killed at its start."""
    await (await made(folder, 1)).close()
    if is_put_back:
        os.replace(folder / KEPT_LOG, folder / LOG)
    before = {name: (folder / name).stat().st_mtime_ns for name in names(folder)}
    reader = DatabaseReader(url_of(folder / DATABASE))
    async with reader.reading() as connection:
        rows = (await connection.execute(text("SELECT value FROM t"))).scalars().all()
    await reader.close()
    assert rows == [1] * ROWS
    assert {name: (folder / name).stat().st_mtime_ns for name in names(folder)} == before
