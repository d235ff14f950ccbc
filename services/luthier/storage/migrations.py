"""Bring a database to the schema of the code, at start-up and by no other command.

Every package that owns tables owns one Alembic branch: a directory of revision files, the first of which has
`down_revision = None` and a branch label. A database holds as many branches as it has owners.
"""

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import MetaData
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import DBAPIError

from luthier.errors import FailedPrecondition
from luthier.storage.dialect import file_of, open_quiet, open_sync, quiet, unusable
from luthier.storage.files import exclusive

_ENVIRONMENT = Path(__file__).parent / "alembic_environment"

# Alembic keeps the migration it runs in module globals: one at a time in a process.
_ALEMBIC = threading.Lock()


def upgrade(url: str, version_directories: Sequence[Path]) -> None:
    """Migrate a database to the heads of every branch; create it when missing.

    Blocking: call it before the event loop serves, or in a thread. Processes that start together wait for one
    another; all revisions go in with one commit, so a crash leaves the schema as it was.

    Raises FailedPrecondition when the database holds a revision that the code does not know, and when it is none or
    may not be written to.
    """
    path = file_of(url)
    with _usable(path), exclusive(path.with_name(f"{path.name}.migrating")), _ALEMBIC:
        engine = _engine(url)
        try:
            with engine.begin() as connection:
                _migrate(connection, path, _config(version_directories))
        finally:
            engine.dispose()


@contextmanager
def _usable(path: Path) -> Iterator[None]:
    """Say what is wrong with a database that cannot be opened at all."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except (OSError, DBAPIError) as error:
        problem = error.strerror if isinstance(error, OSError) else unusable(error.orig)
        if not problem:
            raise
        raise FailedPrecondition(
            f"{path} must be a database of ours that user {os.geteuid()} may write to: {problem}",
            metadata={"path": str(path)},
        ) from error


def require_current(url: str, version_directories: Sequence[Path]) -> None:
    """Raise FailedPrecondition unless a database that is there has the schema of the code. Changes no file.

    Raises Unavailable where its service starts meanwhile.
    """
    found = quiet(url)
    engine = open_quiet(found)
    try:
        with engine.connect() as connection:
            current = set(MigrationContext.configure(connection).get_current_heads())
    finally:
        engine.dispose()
        found.require_quiet()
    if not _is_current(ScriptDirectory.from_config(_config(version_directories)), current):
        path = file_of(url)
        raise FailedPrecondition(
            f"the database {path} must be of this version, it holds revision {', '.join(sorted(current)) or 'none'}; "
            "start its service with this version, which migrates it, or run the version that it is of",
            metadata={"revisions": ",".join(sorted(current))},
        )


def differences(url: str, metadata: MetaData) -> list[Any]:
    """Return how a migrated database differs from the tables that the code declares: empty when it does not.

    For tests. Each entry is an operation of Alembic that would make the database like the code.
    """
    engine = _engine(url)
    try:
        with engine.connect() as connection:
            context = MigrationContext.configure(connection, opts={"compare_type": True})
            return list(compare_metadata(context, metadata))
    finally:
        engine.dispose()


def _engine(url: str) -> Engine:
    return open_sync(url, execution_options={"luthier_write": True})


def _config(version_directories: Sequence[Path]) -> Config:
    config = Config()
    # `%` starts an interpolation in Alembic's ini options.
    config.set_main_option("script_location", str(_ENVIRONMENT).replace("%", "%%"))
    config.set_main_option("path_separator", "newline")
    config.set_main_option(
        "version_locations", "\n".join(str(directory).replace("%", "%%") for directory in version_directories)
    )
    return config


def _migrate(connection: Connection, path: Path, config: Config) -> None:
    script = ScriptDirectory.from_config(config)
    current = set(MigrationContext.configure(connection).get_current_heads())
    if unknown := sorted(current - {revision.revision for revision in script.walk_revisions()}):
        raise FailedPrecondition(
            f"the database {path} was migrated by newer code: it holds revision {', '.join(unknown)}; "
            "start that newer version or restore a backup",
            metadata={"revisions": ",".join(unknown)},
        )
    if not _is_current(script, current):
        config.attributes["connection"] = connection
        command.upgrade(config, "heads")


def _is_current(script: ScriptDirectory, current: set[str]) -> bool:
    """Tell whether a database holds every head; those that another one depends on it does not name."""
    known = {revision.revision for revision in script.walk_revisions()}
    if not current <= known:
        return False
    there = {revision.revision for revision in script.get_all_current(tuple(current))}
    return there >= set(script.get_heads())
