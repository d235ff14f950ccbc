"""The request log: kept with the work that it answers for, through restarts."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from sqlalchemy import update
from tests.stores import open_database

from luthier.storage.database import Database
from luthier.work import schema
from luthier.work.keeping import ANSWER_KEEP_SECONDS
from luthier.work.requests import SqlRequestLog
from luthier.work.schema import request_log

KEY = ("key:abc", "/luthier.v1.DataService/CreateDataset", "6f0f5c1e-3a71-4a55-8b3e-7a1f7f0c9a11")


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    opened = open_database(tmp_path / "r")
    async with opened.transaction() as connection:
        await connection.run_sync(schema.metadata.create_all)
    yield opened
    await opened.close()


async def test_an_answer_is_found_by_another_process(database: Database) -> None:
    log = SqlRequestLog(database, ANSWER_KEEP_SECONDS)
    async with log.unit_of_work():
        await log.remember(*KEY, "print", b"answer")
    assert await SqlRequestLog(database, ANSWER_KEEP_SECONDS).find(*KEY) == ("print", b"answer")
    assert await log.find("key:other", *KEY[1:]) is None


async def test_an_answer_is_forgotten_with_the_work_that_failed(database: Database) -> None:
    log = SqlRequestLog(database, ANSWER_KEEP_SECONDS)

    async def fail() -> None:
        async with log.unit_of_work():
            await log.remember(*KEY, "print", b"answer")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        await fail()
    assert await log.find(*KEY) is None


async def test_old_answers_are_forgotten(database: Database) -> None:
    log = SqlRequestLog(database, ANSWER_KEEP_SECONDS)
    async with log.unit_of_work():
        await log.remember(*KEY, "print", b"answer")
    async with database.transaction() as connection:
        await connection.execute(
            update(request_log).values(created_at_us=request_log.c.created_at_us - 7200e6)
        )
    for keep_seconds in (0, ANSWER_KEEP_SECONDS, 7300):
        await SqlRequestLog(database, keep_seconds).forget_old()
        assert await log.find(*KEY) is not None
    await SqlRequestLog(database, 7100).forget_old()
    assert await log.find(*KEY) is None
