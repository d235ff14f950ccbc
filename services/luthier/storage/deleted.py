"""What was deleted and is not purged yet: found by its name or its uid, brought back, or given up."""

from __future__ import annotations

import time
from typing import Generic, TypeVar

from google.protobuf.message import Message
from sqlalchemy import ColumnElement, Table, delete, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from luthier.errors import NotFound
from luthier.storage.resource_messages import ResourceMessage
from luthier.storage.stored import Rows, Stored

M = TypeVar("M", bound=ResourceMessage)
P = TypeVar("P", bound=Message)
GIVEN_UP_US = 0
"""Purge time of what is on its way out: parts of it may be gone, so that there is no way back."""


def _now_us() -> int:
    return time.time_ns() // 1000


class DeletedRows(Generic[M, P]):
    """The deleted resources of one family. Every method runs in the caller's transaction."""

    def __init__(self, rows: Rows[M, P]) -> None:
        self.rows = rows

    async def find(self, connection: AsyncConnection, name: str, uid: str = "") -> Stored[M, P]:
        """Return what had a name and was deleted last, or of all that had it the one of a uid. Raises NotFound."""
        columns = self.rows.table.c
        wanted = [columns.name == name, columns.delete_time_us.is_not(None)]
        wanted.append(columns.purge_time_us > GIVEN_UP_US)
        if uid:
            wanted.append(columns.uid == uid)
        statement = select(self.rows.table).where(*wanted).order_by(columns.delete_time_us.desc()).limit(1)
        row = (await connection.execute(statement)).mappings().one_or_none()
        if row is None:
            which = f"{name} with uid {uid}" if uid else name
            raise NotFound(
                f"no deleted {which} is there; what was purged, or deleted before deletions could be undone, is gone",
                metadata={"name": name, "uid": uid},
            )
        return self.rows.of_row(row)

    async def restore(self, connection: AsyncConnection, stored: Stored[M, P]) -> Stored[M, P]:
        """Bring a resource back under its name, which no other has; return it as stored."""
        changes = {
            "delete_time_us": None,
            "purge_time_us": None,
            "update_time_us": _now_us(),
            "revision": await self.rows.first_revision(connection, stored.message.name),
        }
        columns = self.rows.table.c
        await connection.execute(update(self.rows.table).where(columns.uid == stored.uid).values(changes))
        row = await connection.execute(select(self.rows.table).where(columns.uid == stored.uid))
        return self.rows.of_row(row.mappings().one())

    async def give_up(self, connection: AsyncConnection, *uids: str) -> None:
        """Have deleted resources purged soon: there is no way back."""
        columns = self.rows.table.c
        mine = (columns.uid.in_(uids), columns.delete_time_us.is_not(None))
        await connection.execute(update(self.rows.table).where(*mine).values(purge_time_us=GIVEN_UP_US))

    async def purge(self, connection: AsyncConnection, uid: str) -> None:
        """Delete the row of a resource that was given up, its labels, and what it still refers to."""
        columns = self.rows.table.c
        await self.rows.let_go(connection, uid)
        mine = (columns.uid == uid, columns.purge_time_us == GIVEN_UP_US)
        await connection.execute(delete(self.rows.table).where(*mine))


def is_kept(table: Table) -> ColumnElement[bool]:
    """Return what says of a row of a family's table that its resource is there or may come back.

    What is purged is neither, as long as rows of it are left, nor is what was deleted before deletions could be undone.
    """
    return or_(table.c.delete_time_us.is_(None), table.c.purge_time_us > GIVEN_UP_US)
