"""Tables of JSON made into tables of messages: what every family's migration does alike, run by Alembic itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.migration import MigrationContext
from alembic.operations import Operations
from google.rpc import error_details_pb2
from sqlalchemy.engine import RowMapping

from luthier.errors import DataLoss
from luthier.storage import json_rows
from luthier.storage.json_rows import NewRow, status
from luthier.storage.message_tables import message_table
from luthier.stored.v1.evaluation_pb2 import EvaluationPrivate
from luthier.v1.evaluation_pb2 import Evaluation
from luthier.v1.event_pb2 import Progress
from luthier.v1.upload_pb2 import Upload

PARENT = "projects/p"
FILTERS = ["state", "dataset"]


def old_table(name: str, filters: list[str]) -> sa.Table:
    """A family's table as it was before the day of those migrations."""
    extra = [one for one in filters if one != "state"]
    table = sa.Table(
        name,
        sa.MetaData(),
        sa.Column("name", sa.String, primary_key=True),
        *(sa.Column(column, sa.String, nullable=False) for column in ("parent", "uid", "state")),
        sa.Column("labels", sa.JSON, nullable=False),
        *(
            sa.Column(column, sa.BigInteger, nullable=False)
            for column in ("create_time_us", "update_time_us")
        ),
        sa.Column("revision", sa.Integer, nullable=False),
        sa.Column("body", sa.JSON, nullable=False),
        *(sa.Column(column, sa.String, nullable=False) for column in extra),
    )
    sa.Index(f"ix_{name}_page", table.c.parent, table.c.create_time_us, table.c.name)
    for column in filters:
        sa.Index(f"ix_{name}_{column}", table.c.parent, table.c[column], table.c.create_time_us, table.c.name)
    return table


def old_row(name: str, **changes: Any) -> dict[str, Any]:
    return {
        "name": f"{PARENT}/evaluations/{name}",
        "parent": PARENT,
        "uid": f"uid of {name}",
        "state": "RUNNING",
        "labels": {"team": "a"},
        "create_time_us": 1_000_001,
        "update_time_us": 2_000_002,
        "revision": 3,
        "body": {"seed": 7, "done": 2},
        "dataset": "d",
        **changes,
    }


def converted(row: RowMapping) -> NewRow:
    return NewRow(
        message=Evaluation(seed=row["body"]["seed"]),
        private=EvaluationPrivate(base_model="b"),
        progress=Evaluation(progress=Progress(completed=row["body"]["done"])),
        columns={"dataset": f"new {row['dataset']}"},
    )


class Home:
    """A database with an old table, and how it is moved."""

    def __init__(self, path: Path, name: str, filters: list[str]) -> None:
        self.engine = sa.create_engine(f"sqlite:///{path}")
        self.name = name
        self.old = old_table(name, filters)
        self.old.metadata.create_all(self.engine)
        self._filters = filters

    def insert(self, *rows: Mapping[str, Any]) -> None:
        with self.engine.begin() as connection:
            connection.execute(sa.insert(self.old), list(rows))

    def move(self, convert: Callable[[RowMapping], NewRow], **options: Any) -> None:
        """As `migrations.upgrade` does it: all in one transaction, which takes back tables too."""
        with self.engine.connect() as connection:
            connection.exec_driver_sql("BEGIN")
            with Operations.context(MigrationContext.configure(connection)):
                json_rows.move(self.name, self._filters, convert, **options)
            connection.commit()

    def rows(self) -> list[dict[str, Any]]:
        with self.engine.connect() as connection:
            found = connection.execute(sa.text(f"SELECT * FROM {self.name} ORDER BY name")).mappings()
            return [dict(row) for row in found]

    def shape(self) -> tuple[dict[str, bool], dict[str, list[str | None]]]:
        """Columns, whether each may be null, and the columns of each index."""
        inspector = sa.inspect(self.engine)
        columns = {one["name"]: one["nullable"] for one in inspector.get_columns(self.name)}
        indexes = {str(one["name"]): one["column_names"] for one in inspector.get_indexes(self.name)}
        return columns, indexes


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "old.db", "evaluations", FILTERS)


def test_a_row_becomes_its_messages_and_keeps_what_its_columns_said(home: Home) -> None:
    home.insert(old_row("a"))
    home.move(converted)
    (row,) = home.rows()
    message = Evaluation.FromString(row["message"])
    assert (message.name, message.uid, message.seed) == (f"{PARENT}/evaluations/a", "uid of a", 7)
    assert (message.state, dict(message.labels)) == (Evaluation.STATE_RUNNING, {"team": "a"})
    assert message.create_time.ToMicroseconds() == 1_000_001
    assert not message.HasField("progress")
    assert Evaluation.FromString(row["progress"]).progress.completed == 2
    assert EvaluationPrivate.FromString(row["private"]).base_model == "b"
    kept = {key: row[key] for key in ("uid", "name", "parent", "state", "revision", "dataset")}
    assert kept == {
        "uid": "uid of a",
        "name": f"{PARENT}/evaluations/a",
        "parent": PARENT,
        "state": "RUNNING",
        "revision": 3,
        "dataset": "new d",
    }
    times = (row["create_time_us"], row["update_time_us"], row["delete_time_us"])
    assert times == (1_000_001, 2_000_002, None)


def test_a_row_that_reports_nothing_has_no_progress(home: Home) -> None:
    home.insert(old_row("a"))
    message, private = Evaluation(), EvaluationPrivate()
    home.move(lambda row: NewRow(message=message, private=private, columns={"dataset": row["dataset"]}))
    assert [row["progress"] for row in home.rows()] == [b""]


def test_the_table_is_the_one_that_resources_are_stored_in_on_that_day(home: Home, tmp_path: Path) -> None:
    home.move(converted)
    metadata = sa.MetaData()
    message_table("evaluations", metadata, sa.Column("dataset", sa.String, nullable=False))
    today = Home(tmp_path / "today.db", "others", [])
    metadata.create_all(today.engine)
    today.name = "evaluations"
    with today.engine.begin() as connection:  # what came to the table since
        for index in ("deleted", "gone", "purge"):
            connection.execute(sa.text(f"DROP INDEX ix_evaluations_{index}"))
        connection.execute(sa.text("ALTER TABLE evaluations DROP COLUMN purge_time_us"))
    assert home.shape() == today.shape()
    assert sa.inspect(home.engine).get_table_names() == ["evaluations"], "the old table is gone"
    with home.engine.connect() as connection:
        indexes = connection.execute(sa.text("SELECT sql FROM sqlite_master WHERE sql LIKE 'CREATE%INDEX%'"))
        assert all(str(sql).endswith("WHERE delete_time_us IS NULL") for (sql,) in indexes)


def test_a_name_may_be_used_again_by_what_comes_after_a_deleted_row(home: Home) -> None:
    home.insert(old_row("a"))
    home.move(converted)
    with home.engine.begin() as connection:
        again = sa.text(
            "INSERT INTO evaluations SELECT uid || '2', name, parent, state, create_time_us, update_time_us, "
            "delete_time_us, revision, message, progress, private, dataset FROM evaluations LIMIT 1"
        )
        with pytest.raises(sa.exc.IntegrityError):
            connection.execute(again)
    with home.engine.begin() as connection:
        connection.execute(sa.text("UPDATE evaluations SET delete_time_us = 5"))
        connection.execute(sa.text(again.text.replace("delete_time_us, revision", "NULL, revision")))
    assert [row["delete_time_us"] for row in home.rows()] == [5, None]


def test_more_rows_than_are_moved_at_once_are_all_there_in_the_end(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_rows, "_BATCH_ROWS", 3)
    home.insert(*(old_row(f"e{number:02}", body={"seed": number, "done": 0}) for number in range(10)))
    home.move(converted)
    assert [Evaluation.FromString(row["message"]).seed for row in home.rows()] == list(range(10))


def test_a_family_without_states_has_none(tmp_path: Path) -> None:
    home = Home(tmp_path / "old.db", "uploads", ["state"])
    row = old_row("a", state="ACTIVE")
    del row["dataset"]
    home.insert(row)
    home.move(lambda _: NewRow(message=Upload(filename="f"), private=EvaluationPrivate()), has_state=False)
    (moved,) = home.rows()
    assert moved["state"] == ""
    message = Upload.FromString(moved["message"])
    assert (message.filename, message.state) == ("f", Upload.STATE_UNSPECIFIED)
    assert set(home.shape()[1]) == {"ix_uploads_name", "ix_uploads_page"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"body": {"done": 1}}, "KeyError: 'seed'"),
        ({"body": {"seed": "x", "done": 1}}, "TypeError"),
        ({"state": "DREAMING"}, "ValueError.*STATE_DREAMING"),
    ],
)
def test_a_row_that_cannot_be_read_is_named_and_nothing_is_lost(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    home = Home(tmp_path / "old.db", "evaluations", FILTERS)
    home.insert(old_row("a"), old_row("b", **changes))
    before = home.rows()
    message = (
        f"{PARENT}/evaluations/b in evaluations cannot be read by this version: {said}.*start the version"
    )
    with pytest.raises(DataLoss, match=message) as caught:
        home.move(converted)
    assert caught.value.metadata == {"name": f"{PARENT}/evaluations/b"}
    assert home.rows() == before
    assert json.loads(before[0]["body"]) == {"seed": 7, "done": 2}


def test_a_stored_failure_is_what_callers_were_shown() -> None:
    shown = status(
        {
            "code": "RESOURCE_EXHAUSTED",
            "reason": "DISK_FULL",
            "message": "no room",
            "metadata": {"free": "0"},
            "retry_after_seconds": 1.5,
        }
    )
    assert (shown.code, shown.message) == (8, "no room")
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    assert shown.details[0].Unpack(info)
    assert shown.details[1].Unpack(retry)
    assert (info.reason, info.domain, dict(info.metadata)) == ("DISK_FULL", "luthier", {"free": "0"})
    assert retry.retry_delay.ToMilliseconds() == 1500


@pytest.mark.parametrize("metadata", [{}, {"metadata": None}, {"metadata": {}}])
def test_an_older_failure_says_less(metadata: dict[str, Any]) -> None:
    shown = status({"code": "INTERNAL", "reason": "INTERNAL", "message": "m", **metadata})
    assert (shown.code, len(shown.details)) == (13, 1)
    info = error_details_pb2.ErrorInfo()
    assert shown.details[0].Unpack(info)
    assert dict(info.metadata) == {}
