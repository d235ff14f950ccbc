"""Writers that are cancelled anywhere, and whoever writes next."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

from sqlalchemy import text
from tests.stores import open_database


async def test_whoever_is_cancelled_wherever_the_next_one_can_write(tmp_path: Path) -> None:
    """Statements that are cancelled in their threads kept the write lock once, after tens of rounds as these."""
    draw, database = random.Random(3), open_database(tmp_path / "test")
    async with database.transaction() as connection:
        await connection.execute(text("CREATE TABLE t (x INTEGER NOT NULL)"))

    async def write() -> None:
        async with database.transaction() as connection:
            await connection.execute(text("INSERT INTO t VALUES (1)"))
            await connection.execute(text("SELECT count(*) FROM t"))

    for _ in range(60):
        writers = [asyncio.create_task(write()) for _ in range(6)]
        await asyncio.sleep(draw.random() * 0.006)
        for writer in writers:
            if draw.random() < 0.7:
                writer.cancel()
        async with asyncio.timeout(20):
            await asyncio.gather(*writers, return_exceptions=True)
            await write()
    await database.close()
