"""All of the SQL layer that is SQLite's own: what another database does otherwise has its place here, or in `reserve`.

Connections may be closed by two at once, and by whoever gives them up while they are opened.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from sqlite3 import (
    SQLITE_CANTOPEN,
    SQLITE_CORRUPT,
    SQLITE_FULL,
    SQLITE_IOERR,
    SQLITE_NOTADB,
    SQLITE_PERM,
    SQLITE_READONLY,
)
from typing import Any
from urllib.parse import quote

import aiosqlite
from sqlalchemy import URL, ColumnElement, create_engine, event
from sqlalchemy.dialects.sqlite import insert
from sqlalchemy.engine import Connection as SyncConnection
from sqlalchemy.engine import Engine, ExceptionContext
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from luthier.errors import FailedPrecondition, Unavailable
from luthier.storage.disk import NO_ROOM_BYTES, Disk, disk_full
from luthier.storage.local_urls import DATABASES

__all__ = ["insert"]
SYSTEM = "sqlite"
"""Its name in traces."""
MAX_VALUES = 500
"""One statement takes a limited number of values."""
WITHOUT_ROWID: dict[str, Any] = {"sqlite_with_rowid": False}
"""Options of a table whose rows are kept in the order of its key."""
RESERVED_BYTES = 6 << 20
"""Room in the log of writes: SQLite empties it when it holds 4 MiB, what is beyond is free on a full disk, too."""
_GROWING_PAGES = 16
_LOG_BEGINS = (b"\x37\x7f\x06\x82", b"\x37\x7f\x06\x83")
"""What makes a log of a file, by the order of the bytes in its sums."""
_UNUSABLE = frozenset({SQLITE_CANTOPEN, SQLITE_READONLY, SQLITE_NOTADB, SQLITE_PERM, SQLITE_CORRUPT})
_PRAGMAS = (
    "journal_mode=WAL",
    "busy_timeout=60000",
    "foreign_keys=ON",
    # NORMAL would lose the last commits in a power cut: events that watchers have seen, answers given.
    "synchronous=FULL",
)


def url_of(path: Path) -> str:
    """Return the URL of the database that is a file."""
    return DATABASES.of(path)


def check_url(url: str) -> URL:
    """Return a database URL that is supported; raise InvalidArgument for any other."""
    # Not by SQLAlchemy: it cuts a path at its ?, and takes one that is not absolute.
    return URL.create(DATABASES.scheme, database=str(DATABASES.path_of(url)))


def file_of(url: str) -> Path:
    """Return the file of a database. Raises InvalidArgument."""
    return DATABASES.path_of(url)


def open_async(url: str, *, pool_size: int, max_overflow: int) -> AsyncEngine:
    """Return an engine for an event loop. Raises InvalidArgument."""
    # An error is logged, and what is stored may be secret: a URL, a record, what was asked.
    engine = create_async_engine(
        check_url(url),
        pool_size=pool_size,
        max_overflow=max_overflow,
        connect_args={"async_creator_fn": connect},
        hide_parameters=True,
    )
    _configure(engine.sync_engine, _PRAGMAS)
    return engine


def open_sync(url: str, **options: Any) -> Engine:
    """Return an engine for threads. Raises InvalidArgument."""
    engine = create_engine(check_url(url).set(drivername="sqlite"), hide_parameters=True, **options)
    _configure(engine, _PRAGMAS)
    return engine


@dataclass(frozen=True, slots=True, kw_only=True)
class Quiet:
    """How to read a database without changing a file or a folder, not even one of those that SQLite has beside it.

    What a service that runs, or one that was killed, has in the log beside the database is read from there. Where there
    is no log the database is read as a file that nobody writes: `require_quiet` tells whether that was so.

    Attributes:
        path: of its file.
        options: of SQLite's URI.
        seen: size and time of change when nobody wrote; None: there is a log.
    """

    path: Path
    options: str
    seen: tuple[int, int] | None

    def require_quiet(self) -> None:
        """Raise Unavailable where somebody has begun to write to what was read as a file that nobody writes."""
        if self.seen is not None and (_has_log(self.path) or _seen(self.path) != self.seen):
            raise Unavailable(
                f"{self.path} was read as a database that nobody writes, and somebody does: its service has started "
                "meanwhile; read it again"
            )

    def connect(self, **options: Any) -> sqlite3.Connection:
        """Open a connection for a thread."""
        made: sqlite3.Connection = sqlite3.connect(self._uri, uri=True, **options)
        return made

    def connect_async(self, _: str, **options: Any) -> Connection:
        """Return a connection for an event loop, to be awaited."""
        return connect(self._uri, uri=True, **options)

    @property
    def _uri(self) -> str:
        return f"file:{quote(str(self.path))}?mode=ro&{self.options}"


def quiet(url: str) -> Quiet:
    """Return how to read a database that is there. Raises InvalidArgument; FailedPrecondition: it cannot be."""
    path = file_of(url)
    if not _has_log(path):
        return Quiet(path=path, options="immutable=1", seen=_seen(path))
    if not path.with_name(f"{path.name}-shm").exists():
        raise FailedPrecondition(
            f"{path} cannot be read without changing it: {path.name}-wal has what it lacks, and {path.name}-shm is "
            "not there; start its service once",
            metadata={"path": str(path)},
        )
    return Quiet(path=path, options="readonly_shm=1", seen=None)


def _has_log(path: Path) -> bool:
    """Tell whether there is a log that may hold anything: room for one that nobody has written to is none."""
    try:
        with path.with_name(f"{path.name}-wal").open("rb") as log:
            return log.read(4) in _LOG_BEGINS
    except FileNotFoundError:
        return False


def _seen(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def open_quiet(found: Quiet) -> Engine:
    """Return an engine for threads that changes nothing."""
    engine = create_engine("sqlite://", creator=found.connect, poolclass=NullPool, hide_parameters=True)
    _configure(engine, ())
    return engine


def open_quiet_async(found: Quiet) -> AsyncEngine:
    """Return an engine for an event loop that changes nothing."""
    engine = create_async_engine(
        check_url(url_of(found.path)),
        poolclass=NullPool,
        connect_args={"async_creator_fn": found.connect_async},
        hide_parameters=True,
    )
    _configure(engine.sync_engine, ())
    return engine


def open_lasting(url: str) -> SyncConnection:
    """Return a connection that has read: log and index of the database stay as long as it is open."""
    options = {"luthier_write": True}
    connection = open_sync(url, poolclass=NullPool, execution_options=options).connect()
    try:
        connection.exec_driver_sql("SELECT 1 FROM sqlite_master")
        connection.rollback()
    except BaseException:
        connection.close()
        raise
    return connection


def grow_log(connection: SyncConnection) -> None:
    """Let the log of writes grow to what it may need. It goes with the last connection: this one must stay."""
    # What does not fit into so small a cache is written to the log at once; none of it is committed.
    connection.exec_driver_sql(f"PRAGMA cache_size={_GROWING_PAGES}")
    connection.exec_driver_sql("CREATE TABLE reserved (data BLOB)")
    connection.exec_driver_sql(
        "INSERT INTO reserved VALUES (zeroblob(?))", (RESERVED_BYTES + 2 * _GROWING_PAGES * 4096,)
    )
    connection.exec_driver_sql("PRAGMA cache_size=-2000")
    connection.rollback()


def index_of(condition: ColumnElement[bool]) -> dict[str, Any]:
    """Return the options of an index over the rows that meet a condition alone."""
    return {"sqlite_where": condition, "postgresql_where": condition}


def unusable(error: BaseException | None) -> str:
    """Return why a file cannot be used as a database at all, as an error of the database tells; empty: it can be."""
    code = getattr(error, "sqlite_errorcode", None)
    return str(error) if isinstance(code, int) and code & 0xFF in _UNUSABLE else ""


def _configure(engine: Engine, pragmas: Sequence[str]) -> None:
    """Make an engine's connections as pragmas say, and its transactions real and immediate where they write."""

    @event.listens_for(engine, "connect")
    def _connected(dbapi_connection: Any, _record: object) -> None:
        # The driver's own idea of when to begin leaves DDL and SELECT outside transactions; begin below.
        dbapi_connection.isolation_level = None
        cursor = dbapi_connection.cursor()
        for pragma in pragmas:
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    @event.listens_for(engine, "handle_error")
    def _failed(context: ExceptionContext) -> None:
        if _found_no_room(context.original_exception, Path(str(engine.url.database)).parent):
            raise disk_full(str(context.original_exception)) from context.original_exception

    @event.listens_for(engine, "begin")
    def _begun(connection: SyncConnection) -> None:
        # A transaction that reads first and writes later would fail at once when another wrote in between.
        immediate = connection.get_execution_options().get("luthier_write", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if immediate else "BEGIN")


def _found_no_room(error: BaseException, folder: Path) -> bool:
    """Tell whether SQLite found no room: it says so, or it failed on a disk that has none."""
    code = getattr(error, "sqlite_errorcode", None)
    if not isinstance(code, int):
        return False
    primary = code & 0xFF
    # Growing the shared memory of the log fails as an error of the disk, not as a full one.
    has_none = primary in (SQLITE_IOERR, SQLITE_CANTOPEN) and Disk(folder).free_bytes() < NO_ROOM_BYTES
    return primary == SQLITE_FULL or has_none


class _Ending(sqlite3.Connection):
    """A connection that ends its transaction when it is closed.

    SQLite closes for good when the last cursor has gone, and keeps the write lock until then: that of a statement whose
    caller was cancelled lives as long as the error, and nobody could write.
    """

    def close(self) -> None:
        """Roll back, and close."""
        with suppress(sqlite3.Error):  # it is closed already
            self.rollback()
        super().close()


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
        self._opened = sqlite3.connect(database, factory=_Ending, **options)
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
