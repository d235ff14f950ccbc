"""The migrations make the tables that the code declares."""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

from tests.stores import database_url

from luthier.storage.migrations import differences, upgrade
from luthier.work.schema import MIGRATIONS, metadata


def test_the_migrated_schema_is_the_declared_one(tmp_path: Path) -> None:
    url = database_url(tmp_path / "work")
    upgrade(url, (MIGRATIONS,))
    assert differences(url, metadata) == []


def test_tasks_of_an_earlier_release_are_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "old.db"
    earlier = tmp_path / "versions"
    earlier.mkdir()
    for name in ("work_0001_initial.py", "work_0002_losses.py"):
        shutil.copy(MIGRATIONS / name, earlier)
    upgrade(f"sqlite+aiosqlite:///{path}", [earlier])
    columns = "task_id, kind, subject, project, resources, state, epoch, attempt, worker, cancel_requested"
    rows = [("q", "QUEUED", ""), ("l", "LEASED", "w@1"), ("d", "DONE", "w@1")]
    with closing(sqlite3.connect(path)) as old, old:
        for name, state, worker in rows:
            old.execute(
                f"INSERT INTO tasks ({columns}, last_local_number, queued_at_us) "
                f"VALUES ('{name}', 'TRAIN', 'jobs/{name}', 'p', '[]', '{state}', 1, 1, '{worker}', 0, 0, 77)"
            )
    upgrade(f"sqlite+aiosqlite:///{path}", [MIGRATIONS])
    with closing(sqlite3.connect(path)) as new:
        found = new.execute(
            "SELECT task_id, claim, not_before_us, delays, ended_at_us, heard FROM tasks"
        ).fetchall()
        turns = new.execute("SELECT DISTINCT turn_at_us FROM tasks").fetchall()
        required = new.execute(
            "SELECT DISTINCT required_device, required_memory_bytes, said, told FROM tasks"
        ).fetchall()
    assert sorted(found) == [("d", "", 0, 0, 77, 1), ("l", "", 0, 0, 0, 1), ("q", "", 0, 0, 0, 1)]
    assert turns == [(77,)], "as old as they were"
    assert required == [("", 0, "", 0)], "any worker may do them, as before"
