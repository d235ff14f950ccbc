"""Connections to SQLite that may be closed by two at once, and by whoever gives them up while they are opened."""

from __future__ import annotations

import asyncio
import sqlite3
from typing import Any

import aiosqlite


class Connection(aiosqlite.Connection):
    """A connection whose thread is told once to stop, and then closes what it has opened.

    aiosqlite 0.22 tells it each time, and waits for an answer that a thread that has stopped never gives: a reader that
    is cancelled while its engine is disposed of closes its connection a second time, and the event loop never ends.
    It also forgets what its thread opens after its opener was cancelled.
    """

    _stopped: asyncio.Future[Any] | None = None
    _opened: sqlite3.Connection | None = None

    def open(self, database: str, **options: Any) -> sqlite3.Connection:
        """Open the file: in the thread."""
        self._opened = sqlite3.connect(database, **options)
        return self._opened

    def stop(self) -> asyncio.Future[Any] | None:
        """Stop the thread; return what is done once it has stopped, None outside of an event loop."""
        if self._stopped is None:
            self._tx.put_nowait((None, self._close_opened))
            self._stopped = super().stop()
        return None if self._stopped is None else asyncio.shield(self._stopped)

    def _close_opened(self) -> None:
        if self._opened is not None:
            self._opened.close()


def connect(database: str, **options: Any) -> Connection:
    """Return a connection, to be awaited; the options are those of `sqlite3.connect`."""
    made = Connection(lambda: made.open(database, **options), 64)
    # As SQLAlchemy has it: a connection that nobody closed does not keep its process.
    made._thread.daemon = True
    return made
