"""What tests share is what each would have had by itself."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Column, Integer, MetaData, String, Table, insert, select
from sqlalchemy.sql.compiler import SQLCompiler
from tests import quick_hosting
from tests.compiled_once import compiling_once
from tests.conftest import Scheduling
from tests.kept_processes import keeping_processes
from tests.stores import open_database
from tests.unsynced import unsynced

from luthier.storage.database import Database
from luthier.work import host
from luthier.work.limited_pool import LimitedPool
from luthier.work.text_pool import _CHILD, TEXT_LIMITS
from luthier.work.webhooks import sender

THINGS = Table("things", MetaData(), Column("name", String), Column("number", Integer))


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[SQLCompiler]]:
    """What SQLAlchemy compiles, where nothing was before."""
    made: list[SQLCompiler] = []
    compile_one = SQLCompiler.__init__

    def noting(compiler: SQLCompiler, *arguments: Any, **options: Any) -> None:
        made.append(compiler)
        compile_one(compiler, *arguments, **options)

    monkeypatch.setattr(SQLCompiler, "__init__", noting)
    with compiling_once():
        yield made


async def said_to(database: Database, number: int) -> list[tuple[str, int]]:
    async with database.transaction() as connection:
        await connection.run_sync(THINGS.metadata.create_all)
        await connection.execute(insert(THINGS), [{"name": "a", "number": number}])
    wanted = select(THINGS).where(THINGS.c.number == number)
    async with database.reading() as connection:
        seen = (await connection.execute(wanted)).all()
    rows = [(row["name"], row["number"]) for row in await database.rows(wanted)]
    await database.close()
    assert [tuple(row) for row in seen] == rows
    return rows


def test_a_statement_is_compiled_once_for_all_databases(compiled: list[SQLCompiler], tmp_path: Path) -> None:
    async def run() -> None:
        assert await said_to(open_database(tmp_path / "one"), 1) == [("a", 1)]
        before = len(compiled)
        assert before >= 3, "one insert, and one select by each of two drivers"
        assert await said_to(open_database(tmp_path / "other"), 2) == [("a", 2)]
        assert len(compiled) == before

    asyncio.run(run())


def test_a_service_stops_without_a_pause_and_shares_no_certificates_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[Path | None] = []

    def trust(ca_file: Path | None) -> object:
        asked.append(ca_file)
        return object()

    monkeypatch.setattr(quick_hosting, "trust", trust)
    with quick_hosting.hosting_quickly():
        assert vars(host)["ServerOptions"](address="127.0.0.1:0").drain_seconds == 0
        trusting = vars(sender)["trust"]
        assert trusting(None) is trusting(None)
        own = [trusting(tmp_path / "ca.pem") for _ in "ab"]
        assert own[0] is not own[1]
    assert asked == [None, tmp_path / "ca.pem", tmp_path / "ca.pem"]


@pytest.mark.parametrize(
    ("module", "is_real"), [("tests/work/test_log.py", False), ("tests/storage/test_files.py", True)]
)
def test_what_is_not_about_disks_waits_for_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, module: str, is_real: bool
) -> None:
    monkeypatch.setenv("PYTEST_CURRENT_TEST", f"{module}::test_x (call)")

    async def synchronous() -> int:
        database = open_database(tmp_path / "one")
        async with database.reading() as connection:
            [(found,)] = await connection.exec_driver_sql("PRAGMA synchronous")
        await database.close()
        return int(found)

    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    with unsynced(), (tmp_path / "file").open("wb") as file:
        assert asyncio.run(synchronous()) == (2 if is_real else 0)
        synced.clear()
        os.fsync(file.fileno())
        assert synced == ([file.fileno()] if is_real else [])
    if not is_real:
        with unsynced(), pytest.raises(OSError, match="Bad file"):
            os.fsync(999_999)


def pid_of(pool: LimitedPool) -> int:
    """The process that answers the next request of a pool."""
    assert pool.call("k", {"bundle": "none", "do": "raw"}) == {"unknown": "none"}
    [(_, process)] = pool._idle
    running = process._process
    assert isinstance(running, subprocess.Popen)
    return running.pid


def test_a_process_of_texts_is_the_next_pools_unless_it_was_ended_or_has_other_limits() -> None:
    with keeping_processes():
        with closing(LimitedPool(_CHILD, TEXT_LIMITS)) as pool:
            first = pid_of(pool)
        with closing(LimitedPool(_CHILD, replace(TEXT_LIMITS, cpu_seconds=9))) as other:
            assert pid_of(other) != first
        with (
            closing(LimitedPool(_CHILD, TEXT_LIMITS)) as pool,
            closing(LimitedPool(_CHILD, TEXT_LIMITS)) as beside,
        ):
            assert pid_of(pool) == first
            assert pid_of(beside) != first, "one process has one pool"
            os.kill(first, signal.SIGKILL)
            pool._idle[0][1]._process.wait(10)
        with closing(LimitedPool(_CHILD, TEXT_LIMITS)) as pool:
            last = pid_of(pool)
            assert last != first
    with pytest.raises(ProcessLookupError):
        os.kill(last, 0)


def test_done_units_are_forgotten_and_all_others_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    class Node:
        shutting_down = True

    node: Any = Node()
    scheduling = Scheduling.__new__(Scheduling)
    tests = ["tests/a/test_x.py::test_a[1]", "tests/a/test_x.py::test_a[2]", "tests/a/test_x.py::test_b"]
    scheduling.registered_collections = {node: tests}
    scheduling.assigned_work = {
        node: {"tests/a/test_x.py::test_a": dict.fromkeys(tests[:2], False), tests[2]: {tests[2]: False}}
    }
    scheduling.mark_test_complete(node, 0)
    assert scheduling._pending_of(scheduling.assigned_work[node]) == 2
    scheduling.mark_test_complete(node, 1)
    assert list(scheduling.assigned_work[node]) == [tests[2]]
    scheduling.mark_test_complete(node, 2)
    assert scheduling.assigned_work[node] == {}
