"""The migrations make exactly the tables that the code declares."""

from __future__ import annotations

from pathlib import Path

from tests.storage.declared import declared
from tests.stores import database_url

from luthier.storage.migrations import differences, upgrade
from luthier.training import schema
from luthier.work import schema as work_schema


def test_migrations_make_the_tables_that_the_code_declares(tmp_path: Path) -> None:
    url = database_url(tmp_path / "training")
    upgrade(url, [work_schema.MIGRATIONS, schema.MIGRATIONS])
    assert differences(url, declared(work_schema.metadata, schema.metadata)) == []
