"""The migrations make exactly the tables that the code declares."""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import MetaData

from luthier.storage.migrations import differences, upgrade
from luthier.training import schema
from luthier.work import schema as work_schema


def test_migrations_make_the_tables_that_the_code_declares(tmp_path: Path) -> None:
    url = f"sqlite+aiosqlite:///{tmp_path / 'training.db'}"
    upgrade(url, [work_schema.MIGRATIONS, schema.MIGRATIONS])
    whole = MetaData()
    for part in (work_schema.metadata, schema.metadata):
        for table in part.tables.values():
            table.to_metadata(whole)
    assert differences(url, whole) == []
