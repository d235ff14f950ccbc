"""Connections to SQLite that may be closed by two at once."""

from __future__ import annotations

import asyncio
import sqlite3
from functools import partial
from typing import Any

import aiosqlite


class Connection(aiosqlite.Connection):
    """A connection whose thread is told once to stop.

    aiosqlite 0.22 tells it each time, and waits for an answer that a thread that has stopped never gives: a reader that
    is cancelled while its engine is disposed of closes its connection a second time, and the event loop never ends.
    """

    _stopped: asyncio.Future[Any] | None = None

    def stop(self) -> asyncio.Future[Any] | None:
        """Stop the thread; return what is done once it has stopped, None outside of an event loop."""
        if self._stopped is None:
            self._stopped = super().stop()
        return None if self._stopped is None else asyncio.shield(self._stopped)


def connect(database: str, **options: Any) -> Connection:
    """Return a connection, to be awaited; the options are those of `sqlite3.connect`."""
    made = Connection(partial(sqlite3.connect, database, **options), 64)
    # As SQLAlchemy has it: a connection that nobody closed does not keep its process.
    made._thread.daemon = True
    return made
