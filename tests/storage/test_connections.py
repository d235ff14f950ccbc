import asyncio
from pathlib import Path

from luthier.storage.connections import connect


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
