"""The SQL database of a service: one writer at a time, units of work, callbacks after the commit."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import Any, Protocol, TypeVar

from sqlalchemy import Executable, event
from sqlalchemy.engine import Connection, Engine, RowMapping
from sqlalchemy.ext.asyncio import AsyncConnection

from luthier.storage.dialect import file_of, open_async, open_sync
from luthier.storage.disk import NO_ROOM_BYTES, Disk, disk_full
from luthier.storage.reserve import Reserve
from luthier.storage.threads import finished_in

R = TypeVar("R")

_READERS = 4
"""Threads, each with a connection, of `Database.rows`."""


class DatabaseObserver(Protocol):
    """Told how long a database takes, from any thread. Must be quick, and must not raise."""

    def queried(self, seconds: float, statement: str) -> None:
        """A statement ended. It has no values in it. In the context of who made it."""
        ...

    def committed(self, seconds: float) -> None:
        """A transaction that wrote was committed."""
        ...

    def waited(self, seconds: float) -> None:
        """A transaction that writes began after such a wait for others of this process."""
        ...


def _time_statements(engine: Engine, observer: DatabaseObserver) -> None:
    @event.listens_for(engine, "before_cursor_execute")
    def _begins(connection: Connection, *_: object) -> None:
        connection.info["began"] = time.perf_counter()

    @event.listens_for(engine, "after_cursor_execute")
    def _ends(connection: Connection, _cursor: object, statement: str, *_: object) -> None:
        observer.queried(time.perf_counter() - connection.info["began"], statement)


class _Unit:
    """What one unit of work holds: at most one write transaction, and what waits for its commit."""

    def __init__(self, database: "Database") -> None:
        self.database = database
        self.task = asyncio.current_task()
        self.connection: AsyncConnection | None = None
        self.callbacks: list[Callable[[], None]] = []
        self.open = True
        self.committed = False

    async def commit(self) -> None:
        assert self.connection is not None, "nothing was begun"
        await self.connection.commit()
        self.committed = True


_current: ContextVar[_Unit | None] = ContextVar("luthier_unit_of_work", default=None)


class Database:
    """A pool of connections to one database. Use from one event loop; `close` it at the end.

    Writers of this process wait for one another in order of arrival, without a thread or a busy loop each;
    other processes are kept out by the database itself. What finds no room raises ResourceExhausted DISK_FULL.

    `disk` is where it lives: what would fill it asks there for room first. After `reserve` some room is kept for
    transactions that make room, whoever fills the disk.
    """

    def __init__(self, url: str, *, min_free_bytes: int = 0) -> None:
        path = file_of(url)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.disk = Disk(path.parent, min_free_bytes)
        self._engine = open_async(url, pool_size=8, max_overflow=24)
        self._reader = open_sync(url, pool_size=_READERS)
        self._threads = ThreadPoolExecutor(_READERS, thread_name_prefix="database")
        self._writers = self._engine.execution_options(luthier_write=True)
        self._writing = asyncio.Lock()
        self._reserve = Reserve(path, self.disk)
        self._has_reserve = False
        self._is_closed = False
        self._observer: DatabaseObserver | None = None

    def observe(self, observer: DatabaseObserver) -> None:
        """Have an observer told from now on, at most one."""
        assert self._observer is None, "a database has one observer"
        self._observer = observer
        for engine in (self._engine.sync_engine, self._reader):
            _time_statements(engine, observer)

    async def close(self) -> None:
        """Close every connection: those that somebody has just now, when they come back."""
        self._is_closed = True
        await self._engine.dispose()
        self._threads.shutdown()
        self._reader.dispose()
        self._reserve.keep()

    async def reserve(self) -> None:
        """Have room from now on that some transactions find on a full disk: what the last run kept, else of the disk.

        Call it before anything connects to the database. What it has is kept by `close` for the next run.

        Raises:
            ResourceExhausted: DISK_FULL.
        """
        await finished_in(self._threads, self._reserve.take)
        self._has_reserve = True

    async def forgo_reserve(self) -> None:
        """Give back what an earlier run kept."""
        await finished_in(self._threads, self._reserve.drop)

    @asynccontextmanager
    async def unit_of_work(self) -> AsyncIterator[None]:
        """Make every `transaction` of the block part of one, which begins with the first of them.

        Commits when the block ends, rolls back when it raises. A unit inside a unit is part of it. It belongs
        to the task that opened it: other tasks neither join it nor may write while it lasts.
        """
        if self._unit() is not None:
            yield
            return
        unit = _Unit(self)
        token = _current.set(unit)
        try:
            async with self._committing(unit):
                yield
        finally:
            unit.open = False
            _current.reset(token)
            # Also when the task was cancelled during the commit: the commit was seen through.
            for callback in unit.callbacks if unit.committed else ():
                callback()

    @asynccontextmanager
    async def transaction(self, *, makes_room: bool = False) -> AsyncIterator[AsyncConnection]:
        """Open a write transaction; commit at the end of the block, roll back when it raises.

        On a disk without room only those that make some may use what `reserve` keeps.
        Inside a unit of work (or another transaction) it is a part of that one: a part that raises is undone
        even when the exception is caught outside of it, the rest goes on.
        """
        unit = self._unit()
        if unit is None:
            async with self.unit_of_work(), self._begun(makes_room) as connection:
                yield connection
            return
        connection = await self._begin(unit, makes_room)
        registered = len(unit.callbacks)
        try:
            async with connection.begin_nested():
                yield connection
        except BaseException:
            del unit.callbacks[registered:]
            raise

    async def rows(self, statement: Executable) -> Sequence[RowMapping]:
        """Return the rows of one statement that reads. Joins a unit of work that has begun to write.

        All of it happens in one thread at once: a third of the work of `reading`, which changes threads for
        every step.
        """
        unit = _current.get()
        if unit is not None and unit.connection is not None and self._joins(unit):
            return (await unit.connection.execute(statement)).mappings().all()
        return await finished_in(self._threads, self._rows, statement)

    def _rows(self, statement: Executable) -> Sequence[RowMapping]:
        with self._reader.connect() as connection:
            return connection.execute(statement).mappings().all()

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[AsyncConnection]:
        """Open a read transaction: one consistent state. Joins a unit of work that has begun to write."""
        unit = _current.get()
        if unit is not None and unit.connection is not None and self._joins(unit):
            yield unit.connection
            return
        connection = await self._engine.connect()
        try:
            yield connection
        finally:
            await _finished(self._give_back(connection))

    async def _give_back(self, connection: AsyncConnection) -> None:
        """Let go of a connection; what is not committed is rolled back."""
        if self._is_closed:
            # Its pool is gone: there it would stay open until somebody collects the garbage.
            await connection.invalidate()
        await connection.close()

    def is_writing(self) -> bool:
        """Tell whether the current task has a write transaction open, so that nobody else can write."""
        unit = self._unit()
        return unit is not None and unit.connection is not None

    def after_commit(self, callback: Callable[[], None]) -> None:
        """Call back once the current transaction is committed; never when it is rolled back.

        The callback runs outside the transaction, must be quick and must not raise. Raises RuntimeError
        outside of `transaction` and `unit_of_work`.
        """
        unit = self._unit()
        if unit is None:
            raise RuntimeError("after_commit must be called inside transaction() or unit_of_work()")
        unit.callbacks.append(callback)

    def _joins(self, unit: _Unit) -> bool:
        return unit.open and unit.database is self and unit.task is asyncio.current_task()

    def _unit(self) -> _Unit | None:
        unit = _current.get()
        if unit is None or not unit.open or unit.database is not self:
            return None
        if unit.task is not asyncio.current_task():
            # Waiting for the unit's end could wait for ever: its task may be waiting for this one.
            raise RuntimeError(
                "a unit of work belongs to the task that opened it: start other tasks from after_commit, "
                "and use asyncio.timeout instead of asyncio.wait_for"
            )
        return unit

    @asynccontextmanager
    async def _begun(self, makes_room: bool) -> AsyncIterator[AsyncConnection]:
        unit = _current.get()
        assert unit is not None, "called inside a unit of work"
        yield await self._begin(unit, makes_room)

    async def _begin(self, unit: _Unit, makes_room: bool) -> AsyncConnection:
        if unit.connection is None:
            if self._has_reserve and not makes_room and self.disk.free_bytes() < NO_ROOM_BYTES:
                raise disk_full("what is left is for cancelling")
            began = time.perf_counter()
            await self._writing.acquire()
            if self._observer is not None:
                self._observer.waited(time.perf_counter() - began)
            try:
                connection = await self._writers.connect()
            except BaseException:
                self._writing.release()
                raise
            unit.connection = connection
            await connection.begin()
        return unit.connection

    @asynccontextmanager
    async def _committing(self, unit: _Unit) -> AsyncIterator[None]:
        try:
            yield
            if unit.connection is None:
                unit.committed = True
            else:
                began = time.perf_counter()
                await _finished(unit.commit())
                if self._observer is not None:
                    self._observer.committed(time.perf_counter() - began)
        finally:
            if unit.connection is not None:
                try:
                    await _finished(self._give_back(unit.connection))
                finally:
                    self._writing.release()


async def _finished(work: Coroutine[Any, Any, R]) -> R:
    # A commit that is cancelled half-way would leave its caller without knowing: see it through.
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None and task.exception() is None:
        raise cancelled
    return task.result()
