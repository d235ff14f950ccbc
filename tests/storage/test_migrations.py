import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from sqlalchemy import Column, Integer, MetaData, String, Table

from luthier.errors import FailedPrecondition
from luthier.storage.migrations import differences, upgrade

FIRST = '''
"""First."""
import sqlalchemy as sa
from alembic import op

revision = "{name}_1"
down_revision = None
branch_labels = ("{name}",)
depends_on = None


def upgrade() -> None:
    op.create_table("{name}", sa.Column("id", sa.Integer, primary_key=True))
'''
SECOND = '''
"""Second."""
import sqlalchemy as sa
from alembic import op

revision: str = "{name}_2"
down_revision: str | None = "{name}_1"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("{name}", sa.Column("title", sa.String, nullable=False, server_default=""))
    {then}
'''


def branch(root: Path, name: str, *, second: bool = True, then: str = "pass") -> Path:
    directory = root / name
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "__init__.py").touch()
    (directory / f"{name}_1_first.py").write_text(FIRST.format(name=name))
    if second:
        (directory / f"{name}_2_second.py").write_text(SECOND.format(name=name, then=then))
    return directory


def tables(*names: str, title: bool = True) -> MetaData:
    metadata = MetaData()
    for name in names:
        columns = [Column("title", String, nullable=False, server_default="")] if title else []
        Table(name, metadata, Column("id", Integer, primary_key=True), *columns)
    return metadata


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite+aiosqlite:///{tmp_path}/100%/test.db"


def test_upgrade_creates_the_tables_of_every_branch(tmp_path: Path, url: str) -> None:
    directories = [branch(tmp_path / "100%", "red"), branch(tmp_path / "v", "blue")]
    upgrade(url, directories)
    assert differences(url, tables("red", "blue")) == []
    upgrade(url, directories)
    assert differences(url, tables("red", "blue")) == []


def test_upgrade_goes_on_from_where_the_database_is(tmp_path: Path, url: str) -> None:
    upgrade(url, [branch(tmp_path, "red", second=False)])
    assert differences(url, tables("red", title=False)) == []
    upgrade(url, [branch(tmp_path, "red"), branch(tmp_path, "blue")])
    assert differences(url, tables("red", "blue")) == []


def test_differences_tells_a_column_and_a_table_that_migrations_forgot(tmp_path: Path, url: str) -> None:
    upgrade(url, [branch(tmp_path, "red", second=False)])
    found = differences(url, tables("red", "blue"))
    assert {entry[0] for entry in found} == {"add_column", "add_table"}


def test_upgrade_that_fails_leaves_the_schema_as_it_was(tmp_path: Path, url: str) -> None:
    upgrade(url, [branch(tmp_path, "red", second=False)])
    with pytest.raises(ZeroDivisionError):
        upgrade(url, [branch(tmp_path, "red", then="1 / 0"), branch(tmp_path, "blue")])
    assert differences(url, tables("red", title=False)) == []
    upgrade(url, [branch(tmp_path, "red")])
    assert differences(url, tables("red")) == []


def test_upgrade_refuses_a_database_of_newer_code(tmp_path: Path, url: str) -> None:
    upgrade(url, [branch(tmp_path / "new", "red")])
    with pytest.raises(FailedPrecondition, match="newer code: it holds revision red_2"):
        upgrade(url, [branch(tmp_path / "old", "red", second=False)])
    assert differences(url, tables("red")) == []


def test_upgrade_from_several_processes_at_once_migrates_once(tmp_path: Path, url: str) -> None:
    directories = [branch(tmp_path, "red"), branch(tmp_path, "blue")]
    children = [subprocess.Popen([sys.executable, "-c", script(url, directories)]) for _ in range(3)]
    assert [child.wait() for child in children] == [0, 0, 0]
    assert differences(url, tables("red", "blue")) == []


def script(url: str, directories: list[Path]) -> str:
    return (
        "import pathlib\nfrom luthier.storage.migrations import upgrade\n"
        f"upgrade({url!r}, [pathlib.Path(d) for d in {[str(d) for d in directories]!r}])"
    )


def test_upgrade_of_a_current_database_runs_nothing(tmp_path: Path, url: str) -> None:
    directories = [branch(tmp_path, "red")]
    upgrade(url, directories)
    branch(tmp_path, "red", then="1 / 0")
    upgrade(url, directories)
    assert differences(url, tables("red")) == []


def test_a_revision_that_two_files_claim_is_told(tmp_path: Path, url: str) -> None:
    directory = branch(tmp_path, "red")
    (directory / "again.py").write_text((directory / "red_2_second.py").read_text())
    with pytest.warns(UserWarning, match="red_2 is present more than once"):
        upgrade(url, [directory])


def test_upgrade_leaves_a_database_in_wal_mode(tmp_path: Path, url: str) -> None:
    upgrade(url, [branch(tmp_path, "red")])
    connection = sqlite3.connect(tmp_path / "100%" / "test.db")
    try:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    finally:
        connection.close()
