"""Rows by name made into rows by uid: what the migrations of each service share.

What stands here is as it was on the day of those migrations, and never changes again.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import sqlalchemy as sa
from alembic import op
from google.protobuf.message import Message

M = TypeVar("M", bound=Message)
P = TypeVar("P", bound=Message)
_BATCH_ROWS = 500


def key_by_uid(*families: str) -> None:
    """Write uids in place of the names that tasks and events of these families are keyed by."""
    for family in families:
        for table in ("tasks", "events"):
            op.execute(
                # The index of names is one of what is not deleted, which is all there is.
                f"UPDATE {table} SET uid = (SELECT uid FROM {family} "
                f"WHERE name = {table}.uid AND delete_time_us IS NULL) "
                f"WHERE uid IN (SELECT name FROM {family} WHERE delete_time_us IS NULL)"
            )


def uids(family: str) -> dict[str, str]:
    """Return the uid of each name of a family."""
    rows = op.get_bind().execute(sa.text(f"SELECT name, uid FROM {family}")).all()
    return {row.name: row.uid for row in rows}


def messages(family: str, types: tuple[type[M], type[P]]) -> Iterator[tuple[M, P]]:
    """Yield the public and the private message of each resource of a family, by uid."""
    connection = op.get_bind()
    message_type, private_type = types
    after = ""
    while True:
        statement = sa.text(
            f"SELECT uid, message, private FROM {family} WHERE uid > :after ORDER BY uid LIMIT {_BATCH_ROWS}"
        )
        rows = connection.execute(statement, {"after": after}).all()
        for _, message, private in rows:
            yield message_type.FromString(message), private_type.FromString(private)
        if len(rows) < _BATCH_ROWS:
            return
        after = rows[-1].uid


def write(family: str, message: Any) -> None:
    """Store the public message of a resource in place of the one that is there."""
    statement = sa.text(f"UPDATE {family} SET message = :message WHERE uid = :uid")
    op.get_bind().execute(
        statement.bindparams(sa.bindparam("message", type_=sa.LargeBinary)),
        {"uid": message.uid, "message": message.SerializeToString(deterministic=True)},
    )


def hold(held: str, holder_uid: str, holder: str, *, lasting: bool) -> None:
    """Have a resource hold another one of the same service, by uids; none where it is not known which one that was."""
    if not held:
        return
    op.get_bind().execute(
        sa.text(
            "INSERT OR IGNORE INTO holds (held, hold, holder, lasting) VALUES (:held, :hold, :holder, :lasting)"
        ),
        {"held": held, "hold": holder_uid, "holder": holder, "lasting": lasting},
    )


def need_elsewhere(names: Sequence[str], holder_uid: str, holder: str) -> None:
    """Have a resource need others of other services, whose uids are not known here."""
    for name in names:
        values = {"hold": str(uuid.uuid4()), "name": name, "holder_uid": holder_uid, "holder": holder}
        op.get_bind().execute(
            sa.text(
                "INSERT INTO held_elsewhere (hold, name, uid, holder_uid, holder, released) "
                "VALUES (:hold, :name, '', :holder_uid, :holder, 0)"
            ),
            values,
        )
