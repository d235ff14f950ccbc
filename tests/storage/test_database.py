# A transaction that fails is a block of several statements by nature.
# ruff: noqa: PT012
import asyncio
import contextvars
import gc
import warnings
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import pytest_asyncio
from sqlalchemy import event, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import AsyncConnection
from tests.stores import open_database

from luthier.errors import InvalidArgument
from luthier.storage.database import Database


@pytest_asyncio.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    database = open_database(tmp_path / "new" / "folder" / "test")
    async with database.transaction() as connection:
        await connection.execute(text("CREATE TABLE t (x INTEGER NOT NULL)"))
        await connection.execute(text("CREATE TABLE counter (n INTEGER NOT NULL)"))
        await connection.execute(text("INSERT INTO counter VALUES (0)"))
    yield database
    await database.close()


async def add(connection: AsyncConnection, x: int | None) -> None:
    await connection.execute(text("INSERT INTO t VALUES (:x)"), {"x": x})


async def values(database: Database) -> list[int]:
    async with database.reading() as connection:
        return [row.x for row in await connection.execute(text("SELECT x FROM t ORDER BY rowid"))]


@pytest.mark.parametrize(
    "url", ["sqlite+aiosqlite://", "sqlite+aiosqlite:///:memory:", "mysql://u:secret@h/d"]
)
def test_database_refuses_an_url_it_cannot_keep_its_promises_on(url: str) -> None:
    with pytest.raises(InvalidArgument, match="sqlite") as caught:
        Database(url)
    assert "secret" not in str(caught.value)


async def test_connections_are_durable_and_check_foreign_keys(database: Database) -> None:
    async with database.reading() as connection:
        found = {
            pragma: (await connection.execute(text(f"PRAGMA {pragma}"))).scalar_one()
            for pragma in ("journal_mode", "busy_timeout", "foreign_keys", "synchronous")
        }
    assert found == {"journal_mode": "wal", "busy_timeout": 60000, "foreign_keys": 1, "synchronous": 2}


async def test_transaction_commits_as_a_whole_or_not_at_all(database: Database) -> None:
    async with database.transaction() as connection:
        await add(connection, 1)
    with pytest.raises(ZeroDivisionError):
        async with database.transaction() as connection:
            await add(connection, 2)
            raise ZeroDivisionError
    assert await values(database) == [1]


async def test_transactions_that_read_then_write_never_lose_an_update(database: Database) -> None:
    async def increment() -> None:
        async with database.transaction() as connection:
            n = (await connection.execute(text("SELECT n FROM counter"))).scalar_one()
            await asyncio.sleep(0)
            await connection.execute(text("UPDATE counter SET n = :n"), {"n": n + 1})

    await asyncio.gather(*(increment() for _ in range(20)))
    async with database.reading() as connection:
        assert (await connection.execute(text("SELECT n FROM counter"))).scalar_one() == 20


async def test_transactions_of_two_database_objects_never_lose_an_update(
    tmp_path: Path, database: Database
) -> None:
    other = open_database(tmp_path / "new" / "folder" / "test")

    async def increment(through: Database) -> None:
        async with through.transaction() as connection:
            n = (await connection.execute(text("SELECT n FROM counter"))).scalar_one()
            await connection.execute(text("UPDATE counter SET n = :n"), {"n": n + 1})

    try:
        await asyncio.gather(*(increment(through) for _ in range(5) for through in (database, other)))
    finally:
        await other.close()
    async with database.reading() as connection:
        assert (await connection.execute(text("SELECT n FROM counter"))).scalar_one() == 10


async def test_reading_goes_on_beside_a_writer_and_sees_one_state(database: Database) -> None:
    async with database.transaction() as connection:
        await add(connection, 1)
    async with database.reading() as reader:
        assert (await reader.execute(text("SELECT count(*) FROM t"))).scalar_one() == 1
        async with database.transaction() as connection:
            await add(connection, 2)
        assert (await reader.execute(text("SELECT count(*) FROM t"))).scalar_one() == 1
    assert await values(database) == [1, 2]


async def test_unit_of_work_makes_its_transactions_one(database: Database) -> None:
    with pytest.raises(ZeroDivisionError):
        async with database.unit_of_work():
            async with database.transaction() as connection:
                await add(connection, 1)
            assert await values(database) == [1], "reading joins the transaction that has begun"
            async with database.transaction() as connection:
                await add(connection, 2)
            raise ZeroDivisionError
    assert await values(database) == []
    async with database.unit_of_work(), database.unit_of_work():
        async with database.transaction() as connection:
            await add(connection, 3)
        async with database.transaction() as connection:
            await add(connection, 4)
    assert await values(database) == [3, 4]


async def test_unit_of_work_blocks_no_writer_before_its_first_transaction(database: Database) -> None:
    async with database.unit_of_work():
        assert await values(database) == []
        await asyncio.create_task(outside(database))
        async with database.transaction() as connection:
            await add(connection, 2)
    assert await values(database) == [1, 2]


async def outside(database: Database) -> None:
    # As a task of its own whose context does not come from the unit of work.
    async def write() -> None:
        async with database.transaction() as connection:
            await add(connection, 1)

    await asyncio.get_running_loop().create_task(write(), context=contextvars.Context())


async def test_part_of_a_unit_that_fails_is_undone_alone(database: Database) -> None:
    called: list[str] = []
    async with database.unit_of_work():
        async with database.transaction() as connection:
            await add(connection, 1)
            database.after_commit(lambda: called.append("kept"))
        with pytest.raises(ZeroDivisionError):
            async with database.transaction() as connection:
                await add(connection, 2)
                database.after_commit(lambda: called.append("undone"))
                raise ZeroDivisionError
        async with database.transaction() as connection:
            await add(connection, 3)
        assert called == []
    assert await values(database) == [1, 3]
    assert called == ["kept"]


async def test_after_commit_runs_after_the_commit_and_never_after_a_rollback(database: Database) -> None:
    called: list[int] = []
    with pytest.raises(ZeroDivisionError):
        async with database.transaction() as connection:
            database.after_commit(lambda: called.append(0))
            await add(connection, 0)
            raise ZeroDivisionError
    async with database.transaction() as connection:
        database.after_commit(lambda: called.append(1))
        await add(connection, 1)
        assert called == []
    assert called == [1]
    async with database.unit_of_work():
        database.after_commit(lambda: called.append(2))
    assert called == [1, 2]
    with pytest.raises(RuntimeError, match="inside"):
        database.after_commit(lambda: None)


async def test_after_commit_callback_may_open_a_transaction_of_its_own(database: Database) -> None:
    tasks: list[asyncio.Task[None]] = []

    async def follow() -> None:
        async with database.transaction() as connection:
            await add(connection, 2)

    async with database.transaction() as connection:
        await add(connection, 1)
        database.after_commit(lambda: tasks.append(asyncio.create_task(follow())))
    await tasks[0]
    assert await values(database) == [1, 2]


async def test_task_inside_a_unit_of_work_is_refused_instead_of_waiting_for_ever(database: Database) -> None:
    async def write() -> None:
        async with database.transaction() as connection:
            await add(connection, 1)

    async with database.unit_of_work():
        async with database.transaction() as connection:
            await add(connection, 0)
        with pytest.raises(RuntimeError, match="belongs to the task that opened it"):
            await asyncio.create_task(write())
    assert await values(database) == [0]


async def test_cancelled_transaction_rolls_back_and_lets_the_next_one_in(database: Database) -> None:
    entered = asyncio.Event()

    async def stuck() -> None:
        async with database.transaction() as connection:
            await add(connection, 1)
            entered.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(stuck())
    await entered.wait()
    waiting = asyncio.create_task(stuck())
    await asyncio.sleep(0.01)
    waiting.cancel()
    task.cancel()
    await asyncio.gather(task, waiting, return_exceptions=True)
    assert task.cancelled()
    assert waiting.cancelled()
    async with asyncio.timeout(5), database.transaction() as connection:
        await add(connection, 2)
    assert await values(database) == [2]


async def test_cancel_during_the_commit_sees_it_through_and_calls_back(database: Database) -> None:
    called: list[str] = []
    outcomes: set[tuple[int, int]] = set()
    for steps in range(60):
        called.clear()

        async def write() -> None:
            async with database.transaction() as connection:
                await add(connection, 1)
                database.after_commit(lambda: called.append("yes"))

        before = len(await values(database))
        task = asyncio.create_task(write())
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        written = len(await values(database)) - before
        outcomes.add((written, len(called)))
    assert outcomes <= {(0, 0), (1, 1)}, "called back exactly when committed"


class Stopwatch:
    """Writes down what an observer of a database is told."""

    def __init__(self) -> None:
        self.queries: list[float] = []
        self.commits: list[float] = []
        self.waits: list[float] = []
        self.committed, self.waited = self.commits.append, self.waits.append

    def queried(self, seconds: float, statement: str) -> None:
        assert statement
        self.queries.append(seconds)


async def test_an_observer_hears_how_long_statements_commits_and_waits_take(database: Database) -> None:
    watch = Stopwatch()
    database.observe(watch)

    async def slow() -> None:
        async with database.transaction() as connection:
            await add(connection, 1)
            await asyncio.sleep(0.2)

    async def quick() -> None:
        await asyncio.sleep(0.05)
        async with database.transaction() as connection:
            await add(connection, 2)

    await asyncio.gather(slow(), quick())
    assert len(watch.waits) == len(watch.commits) == 2
    assert watch.waits[0] < 0.1 <= watch.waits[1], "who comes second waits for the first"
    assert all(0 < seconds < 1 for seconds in watch.commits)
    before = len(watch.queries)
    assert len(await database.rows(text("SELECT x FROM t"))) == 2
    assert await values(database) == [1, 2]
    assert len(watch.queries) >= before + 2, "in threads and on the loop"
    assert all(seconds >= 0 for seconds in watch.queries)


async def test_what_is_rolled_back_is_no_commit(database: Database) -> None:
    watch = Stopwatch()
    database.observe(watch)
    with pytest.raises(ZeroDivisionError):
        async with database.transaction() as connection:
            await add(connection, 1)
            raise ZeroDivisionError
    async with database.unit_of_work():
        pass
    assert watch.commits == []


@contextmanager
def nothing_dropped() -> Iterator[None]:
    """No connection that was made in the block is forgotten while it is open."""
    gc.collect()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        yield
        gc.collect()
    assert [str(one.message) for one in told if issubclass(one.category, ResourceWarning)] == []


@pytest.mark.parametrize("opened", ["reading", "transaction"])
async def test_who_is_cancelled_while_it_connects_leaves_no_connection_open(
    tmp_path: Path, opened: str
) -> None:
    database = open_database(tmp_path / "test")

    async def connects() -> None:
        async with getattr(database, opened)():
            raise AssertionError("it was cancelled")

    @event.listens_for(database._engine.sync_engine, "connect", insert=True)
    def _cancel(*_: object) -> None:
        if (task := asyncio.current_task()) is not None:
            task.cancel()

    with nothing_dropped():
        with pytest.raises(asyncio.CancelledError):
            await asyncio.create_task(connects())
        event.remove(database._engine.sync_engine, "connect", _cancel)
        async with database.transaction() as connection:
            await connection.execute(text("CREATE TABLE t (x INTEGER NOT NULL)"))
        await database.close()


@pytest.mark.parametrize("opened", ["reading", "transaction"])
async def test_who_reads_or_writes_when_the_database_is_closed_leaves_no_connection_open(
    tmp_path: Path, opened: str
) -> None:
    database = open_database(tmp_path / "test")
    with nothing_dropped():
        async with getattr(database, opened)() as connection:
            await connection.execute(text("SELECT 1"))
            await database.close()


async def test_a_reader_that_is_cancelled_gives_its_connection_back_before_it_ends(
    tmp_path: Path,
) -> None:
    database = open_database(tmp_path / "test")
    reads = asyncio.Event()

    async def read() -> None:
        async with database.reading() as connection:
            await connection.execute(text("SELECT 1"))
            reads.set()
            await asyncio.sleep(60)

    reader = asyncio.create_task(read())
    await reads.wait()
    reader.cancel()
    await asyncio.sleep(0)
    reader.cancel()  # while it gives back
    with pytest.raises(asyncio.CancelledError):
        await reader
    assert database._engine.sync_engine.pool.checkedout() == 0  # type: ignore[attr-defined]
    await database.close()


@pytest.mark.parametrize("reads", [False, True])
async def test_what_is_stored_is_in_no_error(database: Database, reads: bool) -> None:
    """Errors are logged, and what is stored may be secret."""
    statement = text("SELECT y FROM t WHERE x = :x" if reads else "INSERT INTO t (y) VALUES (:x)")
    with pytest.raises(OperationalError, match=r"no such column|no column named") as caught:
        if reads:
            await database.rows(statement.bindparams(x="https://a.example/s3cret"))
        async with database.transaction() as connection:
            await connection.execute(statement, {"x": "https://a.example/s3cret"})
    assert "s3cret" not in str(caught.value)
