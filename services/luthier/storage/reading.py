"""Read what a service keeps its state in, and change nothing: no file, no folder, no time of change."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Protocol

from sqlalchemy.ext.asyncio import AsyncConnection

from luthier.storage.dialect import open_quiet_async, quiet


class Readable(Protocol):
    """A database that can be read."""

    def reading(self) -> AbstractAsyncContextManager[AsyncConnection]:
        """Open a read transaction: one consistent state."""
        ...


class DatabaseReader:
    """A database that is there, `Readable` beside a service that runs too. Use from one event loop; `close` it.

    Raises FailedPrecondition where it cannot be read without changing it.
    """

    def __init__(self, url: str) -> None:
        self._quiet = quiet(url)
        self._engine = open_quiet_async(self._quiet)

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[AsyncConnection]:
        """Open a read transaction. Raises Unavailable at its end where the database's service has started meanwhile."""
        try:
            async with self._engine.connect() as connection:
                yield connection
        except Exception:
            self._quiet.require_quiet()
            raise
        self._quiet.require_quiet()

    async def close(self) -> None:
        """Close every connection."""
        await self._engine.dispose()
