"""Bring a database to the schema of the code, at start-up and by no other command.

Every package that owns tables owns one Alembic branch: a directory of revision files, the first of which has
`down_revision = None` and a branch label. A database holds as many branches as it has owners.
"""

import ast
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import MetaData, create_engine, inspect, text
from sqlalchemy.engine import Engine

from luthier.errors import FailedPrecondition
from luthier.storage.database import check_url, configure_sqlite
from luthier.storage.files import exclusive

if TYPE_CHECKING:
    from alembic.config import Config

_ENVIRONMENT = Path(__file__).parent / "alembic_environment"

# Alembic keeps the migration it runs in module globals: one at a time in a process.
_ALEMBIC = threading.Lock()


@dataclass(frozen=True, slots=True)
class _Revision:
    revision: str
    down_revisions: tuple[str, ...]


def upgrade(url: str, version_directories: Sequence[Path]) -> None:
    """Migrate a database to the heads of every branch; create it when missing.

    Blocking: call it before the event loop serves, or in a thread. Processes that start together wait for one
    another; all revisions go in with one commit, so a crash leaves the schema as it was. A database that is
    up to date costs a few milliseconds: Alembic is not even imported.

    Raises FailedPrecondition when the database holds a revision that the code does not know.
    """
    parsed = check_url(url)
    path = Path(str(parsed.database))
    path.parent.mkdir(parents=True, exist_ok=True)
    known = _revisions(version_directories)
    heads = set(known) - {down for revision in known.values() for down in revision.down_revisions}
    with exclusive(path.with_name(f"{path.name}.migrating")), _ALEMBIC:
        engine = _engine(url)
        try:
            current = _current(engine)
            if unknown := sorted(current - set(known)):
                raise FailedPrecondition(
                    f"the database {path} was migrated by newer code: it holds revision "
                    f"{', '.join(unknown)}; "
                    "start that newer version or restore a backup",
                    metadata={"revisions": ",".join(unknown)},
                )
            if current != heads:
                _run(engine, version_directories)
        finally:
            engine.dispose()


def differences(url: str, metadata: MetaData) -> list[Any]:
    """Return how a migrated database differs from the tables that the code declares: empty when it does not.

    For tests. Each entry is an operation of Alembic that would make the database like the code.
    """
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    engine = _engine(url)
    try:
        with engine.connect() as connection:
            context = MigrationContext.configure(connection, opts={"compare_type": True})
            return list(compare_metadata(context, metadata))
    finally:
        engine.dispose()


def _engine(url: str) -> Engine:
    engine = create_engine(check_url(url).set(drivername="sqlite"), execution_options={"luthier_write": True})
    configure_sqlite(engine)
    return engine


def _current(engine: Engine) -> set[str]:
    with engine.connect() as connection:
        if not inspect(connection).has_table("alembic_version"):
            return set()
        return set(connection.execute(text("SELECT version_num FROM alembic_version")).scalars())


def _run(engine: Engine, version_directories: Sequence[Path]) -> None:
    from alembic import command

    with engine.begin() as connection:
        command.upgrade(_config(version_directories, {"connection": connection}), "heads")


def _config(version_directories: Sequence[Path], attributes: Mapping[str, Any]) -> "Config":
    from alembic.config import Config

    config = Config(attributes=dict(attributes))
    # `%` starts an interpolation in Alembic's ini options.
    config.set_main_option("script_location", str(_ENVIRONMENT).replace("%", "%%"))
    config.set_main_option("path_separator", "newline")
    config.set_main_option(
        "version_locations", "\n".join(str(directory).replace("%", "%%") for directory in version_directories)
    )
    return config


def _revisions(version_directories: Iterable[Path]) -> dict[str, _Revision]:
    """Read the revision files without running them: importing Alembic would take far longer."""
    found: dict[str, _Revision] = {}
    for directory in version_directories:
        for path in sorted(directory.glob("[!_.]*.py")):
            revision = _parsed(path)
            assert revision.revision not in found, f"{path} repeats the revision {revision.revision}"
            found[revision.revision] = revision
    return found


def _parsed(path: Path) -> _Revision:
    constants: dict[str, Any] = {}
    for statement in ast.parse(path.read_text()).body:
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            target, value = statement.targets[0].id, statement.value
        elif (
            isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and statement.value
        ):
            target, value = statement.target.id, statement.value
        else:
            continue
        if target in ("revision", "down_revision"):
            constants[target] = ast.literal_eval(value)
    down = constants["down_revision"]
    return _Revision(
        constants["revision"], () if down is None else (down,) if isinstance(down, str) else tuple(down)
    )
