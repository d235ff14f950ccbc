"""The inside of a process that builds: why it failed, as its driver is told."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from luthier.data.worker import child
from luthier.data.worker.order import BuildOrder
from luthier.errors import Reason, ResourceExhausted
from luthier.worker.v1 import task_pb2

NO_LINE: Any = None


def full(folder: Path) -> None:
    """Sort more than a file may hold."""
    with closing(sqlite3.connect(folder / "sorted", isolation_level=None)) as connection:
        connection.execute("PRAGMA max_page_count=2")
        connection.execute("CREATE TABLE rows (data BLOB)")
        connection.execute("INSERT INTO rows VALUES (zeroblob(100000))")


def broken(folder: Path) -> None:
    with closing(sqlite3.connect(folder / "sorted")) as connection:
        connection.execute("SELECT data FROM rows")


@pytest.mark.parametrize(
    ("fails", "raises"),
    [(full, ResourceExhausted), (broken, sqlite3.OperationalError)],
    ids=["full", "broken"],
)
def test_a_sort_that_finds_no_room_is_a_full_disk_and_another_failure_is_itself(
    fails: Callable[[Path], None], raises: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the disk itself nothing is lacking: SQLite alone says so."""
    monkeypatch.setattr(child, "built", lambda order, _: fails(order.folder))
    order = BuildOrder(spec=task_pb2.BuildVersionSpec(), sources=(), folder=tmp_path)
    with pytest.raises(raises) as caught:
        child.work(NO_LINE, order)
    if isinstance(caught.value, ResourceExhausted):
        assert caught.value.reason == Reason.DISK_FULL
        assert "database or disk is full" in caught.value.message
