import asyncio
import gc
from pathlib import Path

import pytest
from sqlalchemy import text

from luthier.storage.connections import connect
from luthier.storage.database import Database


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


# A connection of a cancelled reader is told to stop and let go of: its thread may come to it after that.
@pytest.mark.filterwarnings(
    "ignore:.*was deleted before being closed", "ignore::pytest.PytestUnraisableExceptionWarning"
)
@pytest.mark.parametrize("delay", [0.0, 0.001, 0.003])
async def test_a_database_closes_while_its_readers_are_cancelled(tmp_path: Path, delay: float) -> None:
    database = Database(f"sqlite+aiosqlite:///{tmp_path / 'a.db'}")

    async def read() -> None:
        async with database.reading() as connection:
            while True:
                await connection.execute(text("SELECT 1"))

    readers = [asyncio.ensure_future(read()) for _ in range(8)]
    await asyncio.sleep(0.05)
    for reader in readers:
        reader.cancel()
    await asyncio.sleep(delay)
    async with asyncio.timeout(10):
        await database.close()
        await asyncio.gather(*readers, return_exceptions=True)
    gc.collect()
