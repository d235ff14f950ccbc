"""Stored errors of records come back in order, page by page."""

from __future__ import annotations

from pathlib import Path

from tests.stores import database_url, open_database

from luthier.data import schema
from luthier.data.record_errors import add_errors, page_of_errors
from luthier.storage.migrations import upgrade
from luthier.v1.dataset_pb2 import RecordError
from luthier.work import schema as work_schema


async def test_errors_come_back_in_order_page_by_page(tmp_path: Path) -> None:
    upgrade(database_url(tmp_path / "data"), [work_schema.MIGRATIONS, schema.MIGRATIONS])
    database = open_database(tmp_path / "data")
    errors = [
        RecordError(
            filename="a.jsonl", line=line, path="p", reason="TEMPLATE_INVALID", message="no", value="v"
        )
        for line in (3, 1, 2)
    ]
    async with database.transaction() as connection:
        await add_errors(connection, "one", errors)
        await add_errors(connection, "other", ())
        assert await page_of_errors(connection, "one", 0, 2) == errors[:2]
        assert await page_of_errors(connection, "one", 2, 2) == errors[2:]
        assert await page_of_errors(connection, "other", 0, 2) == []
    await database.close()
