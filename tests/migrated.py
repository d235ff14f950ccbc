"""Empty databases get the tables that a real migration of this process made: that takes a hundred times as long.

Hundreds of tests start a service, or what stands behind one, on a database that is not there yet; others make the
tables of a package alone, by SQLAlchemy, which takes ten times as long as what it says to the database.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePath
from typing import Any

import aiosqlite
import pytest
from alembic.config import Config
from sqlalchemy import MetaData
from sqlalchemy.engine import Connection
from sqlalchemy.util import await_only

from luthier.storage import migrations

# What is about migrations and the tables that they make.
REAL = ("test_migration*.py", "test_schema.py")


@contextmanager
def migrating_once() -> Iterator[None]:
    """For the length of a block, do again for an empty database what its migration did to the first one."""
    migrate = migrations._migrate
    made: dict[str, list[str]] = {}

    def again(connection: Connection, path: Path, config: Config) -> None:
        branches = config.get_main_option("version_locations")
        if branches is None or is_about_migrations() or not is_empty(connection):
            migrate(connection, path, config)
        elif branches in made:
            for statement in made[branches]:
                connection.exec_driver_sql(statement)
            name_anew(connection)
        else:
            migrate(connection, path, config)
            made[branches] = statements_of(connection)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(migrations, "_migrate", again)
        yield


@contextmanager
def creating_once() -> Iterator[None]:
    """For the length of a block, do again for a database without some tables what SQLAlchemy did to the first one."""
    create = MetaData.create_all
    made: dict[tuple[MetaData, frozenset[str]], list[str]] = {}

    def again(metadata: MetaData, bind: Any, *arguments: Any, **options: Any) -> None:
        is_usual = (
            isinstance(bind, Connection) and bind.dialect.name == "sqlite" and not arguments and not options
        )
        there = statements_by_name(bind) if is_usual else {}
        if not is_usual or is_about_migrations() or not there.keys().isdisjoint(metadata.tables):
            create(metadata, bind, *arguments, **options)
            return
        wanted = metadata, frozenset(metadata.tables)
        if wanted not in made:
            create(metadata, bind)
            now = statements_by_name(bind)
            made[wanted] = [statement for name, statement in now.items() if name not in there]
        else:
            execute_all(bind, made[wanted])

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(MetaData, "create_all", again)
        yield


def statements_by_name(connection: Connection) -> dict[str, str]:
    """Return the statement that makes each table and each index of a database, in an order that they can be made in."""
    rows = connection.exec_driver_sql(
        "SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL ORDER BY rowid"
    )
    return {row[0]: row[1] for row in rows}


def execute_all(connection: Connection, statements: Sequence[str]) -> None:
    """Execute statements without values; those of an event loop in one change of threads."""
    driver: Any = connection.connection.driver_connection
    if isinstance(driver, aiosqlite.Connection):
        asked: Any = driver
        await_only(asked._execute(partial(_execute_all, asked._conn, statements)))
    else:
        _execute_all(driver, statements)


def _execute_all(driver: Any, statements: Sequence[str]) -> None:
    for statement in statements:
        driver.execute(statement)


def is_about_migrations() -> bool:
    """Tell whether the test that runs wants the real thing."""
    module = PurePath(os.environ.get("PYTEST_CURRENT_TEST", "").partition("::")[0])
    return any(module.match(pattern) for pattern in REAL)


def is_empty(connection: Connection) -> bool:
    """Tell whether a database holds no table."""
    return connection.exec_driver_sql("SELECT 1 FROM sqlite_master").first() is None


def name_anew(connection: Connection) -> None:
    """Give a database that was made like another one an id of its own, as its migration would have."""
    if connection.exec_driver_sql("SELECT 1 FROM sqlite_master WHERE name = 'database_identity'").first():
        connection.exec_driver_sql("UPDATE database_identity SET database_id = ?", (uuid.uuid4().hex,))


def statements_of(connection: Connection) -> list[str]:
    """Return the statements that make an empty database like this one."""
    driver: Any = connection.connection.driver_connection
    return [one for one in driver.iterdump() if one not in {"BEGIN TRANSACTION;", "COMMIT;"}]
