import asyncio
import re
import sqlite3
import threading
from pathlib import Path
from typing import Any

import pytest

from luthier.storage import dialect
from luthier.storage.dialect import connect


async def test_two_who_close_at_once_both_come_back(tmp_path: Path) -> None:
    connection = await connect(str(tmp_path / "a.db"))
    async with asyncio.timeout(10):
        await asyncio.gather(connection.close(), connection.close(), return_exceptions=True)
        await connection.close()


async def test_who_gives_up_a_close_does_not_hold_up_another(tmp_path: Path) -> None:
    connection = await connect(str(tmp_path / "a.db"))
    first = asyncio.ensure_future(connection.close())
    await asyncio.sleep(0)
    first.cancel()
    async with asyncio.timeout(10):
        await asyncio.gather(first, connection.close(), return_exceptions=True)


async def test_a_closed_connection_keeps_nobody_from_writing_whoever_still_reads(tmp_path: Path) -> None:
    """A caller that is cancelled leaves its cursor to the error, for as long as anybody looks at that."""
    connection = await connect(str(tmp_path / "a.db"), isolation_level=None)
    for statement in ("CREATE TABLE t (x)", "INSERT INTO t VALUES (1), (2)", "BEGIN IMMEDIATE"):
        await connection.execute(statement)
    unread = await connection.execute("SELECT x FROM t")
    await connection.close()
    other = await connect(str(tmp_path / "a.db"), isolation_level=None, timeout=0)
    await other.execute("BEGIN IMMEDIATE")
    await other.close()
    assert unread is not None


async def test_what_is_opened_after_its_opener_was_cancelled_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    opened: list[sqlite3.Connection] = []
    really = sqlite3.connect

    def slow(database: str, **options: Any) -> sqlite3.Connection:
        go_on.wait(10)
        opened.append(really(database, check_same_thread=False, **options))
        return opened[0]

    monkeypatch.setattr(sqlite3, "connect", slow)
    connection = connect(str(tmp_path / "a.db"))

    async def opens() -> None:
        await connection

    opener = asyncio.create_task(opens())
    await asyncio.sleep(0.05)
    opener.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opener
    go_on.set()
    stopped = connection.stop()
    assert stopped is not None
    await stopped
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        opened[0].execute("SELECT 1")


def test_what_is_a_dialects_own_stands_in_one_file() -> None:
    """Migrations are as they were on their day, and with them what they share; workers sort in files of their own."""
    source = Path(dialect.__file__).parents[1]
    former = {f"storage/{name}_rows.py" for name in ("json", "label", "uid", "ref", "purge")}
    own = re.compile(
        r"sqlalchemy\.dialects|import aiosqlite|PRAGMA|\b(?:sqlite|postgresql)_(?:where|with_rowid)"
        r"|\browid\b|\bsqlite3\b|\bsqlite_(?:errorcode|master|schema)\b|\bINSERT OR\b"
    )
    found = {
        str(path.relative_to(source))
        for path in source.rglob("*.py")
        if not {"versions", "worker"} & set(path.parts) and own.search(path.read_text())
    }
    assert found - former == {"storage/dialect.py"}
