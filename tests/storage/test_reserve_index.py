"""The index of a log on a full disk, and logs where files have no second names."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from sqlalchemy import text
from tests.small_disk import fill, taken
from tests.storage.test_reserve import (
    DATABASE,
    INDEX,
    KEPT_LOG,
    LOG,
    as_it_is,
    killed,
    made,
    opened,
    require,
    write,
)

from luthier.storage import reserve
from luthier.storage.disk import Disk

OPENING = """
import asyncio, pathlib, sys
from tests.storage.test_reserve import opened
asyncio.run(opened(pathlib.Path(sys.argv[1])))
"""
GOING_ON = """
import asyncio, pathlib, sys
from tests.storage.test_reserve import opened, require, write

async def main():
    database = await opened(pathlib.Path(sys.argv[1]))
    await require(database, int(sys.argv[2]))
    await write(database, int(sys.argv[2]) + 1)
    await database.close()

asyncio.run(main())
"""
ASKING = """
import fcntl, os, struct, sys
asked = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 128, 1, 0)
told = fcntl.fcntl(os.open(sys.argv[1], os.O_RDWR), fcntl.F_GETLK, asked)
print(struct.unpack("hhqqi4x", told)[0] == fcntl.F_RDLCK)
"""


def elsewhere(program: str, path: Path, value: int = 0) -> subprocess.CompletedProcess[str]:
    """What becomes of a program in another process."""
    command = [sys.executable, "-c", program, str(path), str(value)]
    return subprocess.run(command, check=False, capture_output=True, text=True)


def make_sparse(path: Path) -> None:
    copy = path.with_name("copy")
    subprocess.run(["cp", "--sparse=always", str(path), str(copy)], check=True)
    copy.replace(path)


async def test_an_index_that_lacks_its_zeros_is_refused_by_name_on_a_full_disk(small: Path) -> None:
    """As a copy that leaves holes has it: SQLite maps it, and would be ended by writing where there is no room."""
    killed(small)
    make_sparse(small / INDEX)
    assert (small / INDEX).stat().st_blocks * 512 < 32 << 10
    filler = fill(small)
    ended = elsewhere(OPENING, small)
    assert ended.returncode == 1
    assert "the disk is full" in ended.stderr
    filler.unlink()
    database = await opened(small)
    await require(database, 7)
    await database.close()


async def test_the_index_is_used_before_sqlite_opens_it_where_little_is_free(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some MiB are free when it is looked at, and may be gone when SQLite opens the index."""
    await (await made(small, 1)).close()
    fill(small)
    used: list[Path] = []
    in_use = reserve._in_use
    monkeypatch.setattr(Disk, "free_bytes", lambda _: 8 << 20)

    def told(index: Path) -> int | None:
        used.append(index)
        return in_use(index)

    monkeypatch.setattr(reserve, "_in_use", told)
    with taken(small):
        database = await opened(small)
        monkeypatch.undo()
        await require(database, 1)
    assert used == [small / INDEX]
    await database.close()


async def test_a_log_of_commits_is_never_made_none_where_names_are_not_counted(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As some file systems have it, where each file has one name whatever names it has."""
    database = await made(folder)
    await write(database, 5)
    other = await opened(folder)
    monkeypatch.setattr(reserve, "_is_single", Path.exists)
    await database.close()
    await require(other, 5)
    copy = as_it_is(folder, tmp_path / "copy")
    await other.close()
    again = await opened(copy)
    await require(again, 5)
    await again.close()


async def test_an_index_that_this_process_has_open_is_let_alone(small: Path) -> None:
    """With a descriptor that is closed a process loses its locks on the file, and others would cut it."""
    database = await made(small)
    fill(small)
    assert reserve._in_use(small / INDEX) is None
    assert elsewhere(ASKING, small / INDEX).stdout == "True\n"
    await database.close()


async def test_a_full_disk_that_keeps_the_log_from_being_emptied_loses_nothing(small: Path) -> None:
    """What is in the log has no place in the database, which cannot grow: it stays a log, from process to process."""
    database = await made(small)
    fill(small)
    async with database.transaction(makes_room=True) as connection:
        await connection.execute(text("CREATE TABLE big AS SELECT zeroblob(1024 * 1024) AS data"))
    await write(database, 1)
    await database.close()
    assert (small / LOG).samefile(small / KEPT_LOG)
    with taken(small):
        for value in (1, 2):
            ended = elsewhere(GOING_ON, small, value)
            assert ended.returncode == 0, ended.stderr
    copy = as_it_is(small / DATABASE, small.parent / DATABASE)
    as_it_is(small / LOG, small.parent / LOG)
    whole = await opened(copy.parent)
    await require(whole, 3)
    await whole.close()
