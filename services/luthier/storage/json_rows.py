"""Tables of resources that held JSON, made into tables that hold messages: what the migrations of each service share.

What stands here is as it was on the day of those migrations, and never changes again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from alembic import op
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import code_pb2, error_details_pb2, status_pb2
from sqlalchemy.engine import RowMapping

from luthier.errors import DataLoss

_LIVE = sa.text("delete_time_us IS NULL")
_BATCH_ROWS = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class NewRow:
    """What a row of JSON becomes. `progress` holds the fields of the message that are stored apart."""

    message: Message
    private: Message
    progress: Message | None = None
    columns: Mapping[str, str] | None = None


def move(
    family: str,
    filters: Sequence[str],
    convert: Callable[[RowMapping], NewRow],
    *,
    has_state: bool = True,
) -> None:
    """Make the table `family` one of messages, with an index for each column to filter by.

    `convert` is given a row of the old table, its `labels` and `body` read from JSON, and fills in what the row's
    standard columns do not tell.
    """
    old = _rename(family, filters)
    new = _create(family, [one for one in filters if one != "state"])
    for column in filters if has_state else [one for one in filters if one != "state"]:
        order = ["parent", column, "create_time_us", "name"]
        op.create_index(f"ix_{family}_{column}", family, order, sqlite_where=_LIVE)
    connection = op.get_bind()
    rows = connection.execute(sa.select(old)).mappings()
    while batch := rows.fetchmany(_BATCH_ROWS):
        connection.execute(sa.insert(new), [_moved(family, row, convert, has_state) for row in batch])
    op.drop_table(old.name)


def _moved(
    family: str, row: RowMapping, convert: Callable[[RowMapping], NewRow], has_state: bool
) -> dict[str, Any]:
    try:
        return _new_row(row, convert(row), has_state)
    except (ValueError, KeyError, TypeError) as error:
        raise DataLoss(
            f"{row['name']} in {family} cannot be read by this version: {type(error).__name__}: {error}; the database "
            "is as it was, start the version that wrote it",
            metadata={"name": row["name"]},
        ) from error


def status(failure: Mapping[str, Any]) -> status_pb2.Status:
    """Return a stored failure as callers see it."""
    made = status_pb2.Status(code=code_pb2.Code.Value(failure["code"]), message=failure["message"])
    info = error_details_pb2.ErrorInfo(
        reason=failure["reason"], domain="luthier", metadata=failure.get("metadata") or {}
    )
    made.details.add().Pack(info)
    seconds = failure.get("retry_after_seconds")
    if seconds is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(round(seconds * 1e9))
        made.details.add().Pack(retry)
    return made


def _rename(family: str, filters: Sequence[str]) -> sa.Table:
    for index in ("page", *filters):
        op.drop_index(f"ix_{family}_{index}", family)
    old = f"{family}_json"
    op.rename_table(family, old)
    standard = ("name", "parent", "uid", "state")
    return sa.Table(
        old,
        sa.MetaData(),
        *(sa.Column(column, sa.String) for column in standard),
        sa.Column("labels", sa.JSON),
        *(sa.Column(column, sa.BigInteger) for column in ("create_time_us", "update_time_us", "revision")),
        sa.Column("body", sa.JSON),
        *(sa.Column(column, sa.String) for column in filters if column != "state"),
    )


def _create(family: str, extra: Sequence[str]) -> sa.Table:
    made = op.create_table(
        family,
        sa.Column("uid", sa.String, primary_key=True),
        sa.Column("name", sa.String, nullable=False),
        sa.Column("parent", sa.String, nullable=False),
        sa.Column("state", sa.String, nullable=False),
        sa.Column("create_time_us", sa.BigInteger, nullable=False),
        sa.Column("update_time_us", sa.BigInteger, nullable=False),
        sa.Column("delete_time_us", sa.BigInteger),
        sa.Column("revision", sa.Integer, nullable=False),
        sa.Column("message", sa.LargeBinary, nullable=False),
        sa.Column("progress", sa.LargeBinary, nullable=False),
        sa.Column("private", sa.LargeBinary, nullable=False),
        *(sa.Column(column, sa.String, nullable=False) for column in extra),
    )
    op.create_index(f"ix_{family}_name", family, ["name"], unique=True, sqlite_where=_LIVE)
    op.create_index(f"ix_{family}_page", family, ["parent", "create_time_us", "name"], sqlite_where=_LIVE)
    assert made is not None, "Alembic returns the table that it created"
    return made


def _new_row(old: RowMapping, new: NewRow, has_state: bool) -> dict[str, Any]:
    message: Any = new.message
    message.name = old["name"]
    message.uid = old["uid"]
    created = Timestamp()
    created.FromMicroseconds(old["create_time_us"])
    message.create_time.CopyFrom(created)
    if "labels" in message.DESCRIPTOR.fields_by_name:
        message.labels.update(old["labels"])
    if has_state:
        message.state = message.State.Value(f"STATE_{old['state']}")
    return {
        **{column: old[column] for column in ("uid", "name", "parent", "create_time_us", "update_time_us")},
        "state": old["state"] if has_state else "",
        "delete_time_us": None,
        "revision": old["revision"],
        "message": message.SerializeToString(deterministic=True),
        "progress": new.progress.SerializeToString(deterministic=True) if new.progress is not None else b"",
        "private": new.private.SerializeToString(deterministic=True),
        **(new.columns or {}),
    }
