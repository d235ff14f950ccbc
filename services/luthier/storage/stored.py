"""Resources in SQL: one table a family, keyed by uid; a row holds the public message and what only the service knows.

Both are stored as serialised bytes. What is searched or ordered by stands in columns, written from the messages in
one place. A name is unique while its resource is not deleted. The blobs that a resource names are referred to by rows
of their own (`storage.blob_refs`), which every change of it keeps right.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar, cast

from google.protobuf.message import Message
from sqlalchemy import Select, Table, func, select, update
from sqlalchemy.engine import RowMapping
from sqlalchemy.ext.asyncio import AsyncConnection

from luthier.errors import Aborted, AlreadyExists, NotFound, Reason
from luthier.storage import blob_refs, dialect
from luthier.storage.blob_refs import digests_in
from luthier.storage.database import Database
from luthier.storage.pages import (
    Cursor,
    Page,
    Wanted,
    delete_labels,
    insert_labels,
    page_of,
    page_statement,
    parent_of,
)
from luthier.storage.resource_messages import ResourceMessage

M = TypeVar("M", bound=ResourceMessage)
P = TypeVar("P", bound=Message)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored(Generic[M, P]):
    """A resource as it was read.

    Attributes:
        uid: unique for all time, also when a name is used again.
        revision: counts changes, reports of progress aside, from 1, or on from the last one that a deleted resource
            of the name had. The etag is made of it: none of a name comes twice.
        message: the resource as callers see it. Never changed in place: `copy` it.
        private: what only the service knows of it. Never changed in place.
    """

    uid: str
    revision: int
    message: M
    private: P
    _row: Mapping[str, Any] | RowMapping = field(repr=False, compare=False)

    def copy(self) -> M:
        """Return the message to change and to give to `Rows.update`."""
        changed = type(self.message)()
        changed.CopyFrom(self.message)
        return changed

    def copy_private(self) -> P:
        """Return what only the service knows, to change and to give to `Rows.update`."""
        changed = type(self.private)()
        changed.CopyFrom(self.private)
        return changed


def require_etag(stored: Stored[M, P], etag: str) -> None:
    """Raise Aborted ETAG_MISMATCH unless an etag is the resource's own; the empty one is any resource's."""
    if etag and etag != stored.message.etag:
        name, own = stored.message.name, stored.message.etag
        raise Aborted(
            f"{name} has the etag {own}, got {etag}; read it again", metadata={"name": name, "etag": own}
        )


class Seen(Protocol):
    """A resource as callers see it."""

    @property
    def uid(self) -> str:
        """Its uid."""

    @property
    def message(self) -> ResourceMessage:
        """What callers see."""


def require_uid(stored: Seen, uid: str) -> None:
    """Raise NotFound RESOURCE_REPLACED unless a uid is the resource's own; the empty one is any resource's."""
    if uid and uid != stored.uid:
        name = stored.message.name
        raise NotFound(
            f"{name} must have uid {uid}, as when it was seen first, it has {stored.uid}: it was deleted and its name "
            "used again; begin anew without a uid",
            reason=Reason.RESOURCE_REPLACED,
            metadata={"name": name, "uid": stored.uid},
        )


def _now_us() -> int:
    return time.time_ns() // 1000


class Rows(Generic[M, P]):
    """The resources of one family. Holds no connection: every call is given one.

    Every message type has the fields name, uid, create_time, update_time and etag; where it has a `state`, that is an
    enum of its own whose values are named STATE_*; where it has `labels`, they are found by `page_statement`.
    """

    def __init__(
        self,
        table: Table,
        message_type: type[M],
        private_type: type[P],
        *,
        columns: Mapping[str, Callable[[M, P], str]] | None = None,
        progress_fields: Sequence[str] = (),
        blobs: Callable[[P], Iterable[str]] = digests_in,
        clock_us: Callable[[], int] = _now_us,
    ) -> None:
        """Args: what a family is made of.

        table: made by `message_table`.
        message_type: the public resource.
        private_type: what the service knows beside it.
        columns: for each extra column of the table, what it holds.
        progress_fields: fields of the message that `report` may change; they are stored apart.
        blobs: the digests of the blobs that a resource needs as long as it is there, by what the service knows of it.
        clock_us: microseconds since 1970.
        """
        self.table = table
        self._message_type = message_type
        self._private_type = private_type
        self._columns = columns or {}
        self._progress_fields = tuple(progress_fields)
        self._blobs = blobs
        self._clock_us = clock_us
        known = message_type.DESCRIPTOR.fields_by_name
        self._has_labels = "labels" in known
        by_columns = {"etag", "update_time", "delete_time", "purge_time"}.intersection(known)
        self._told_apart = (*by_columns, *progress_fields)
        states = known["state"].enum_type if "state" in known else None
        values = () if states is None else states.values
        self._states: dict[int, str] = {one.number: one.name.removeprefix("STATE_") for one in values}

    async def insert(self, connection: AsyncConnection, message: M, private: P) -> Stored[M, P]:
        """Store a new resource under `message.name`; its uid and times are given here.

        Raises AlreadyExists when a resource of this name is there that is not deleted.
        """
        revision = await self.first_revision(connection, message.name)
        now_us = self._clock_us()
        row = self._row(
            message,
            private,
            uid=str(uuid.uuid4()),
            create_time_us=now_us,
            update_time_us=now_us,
            revision=revision,
        )
        statement = dialect.insert(self.table).values(row)
        is_live = self.table.c.delete_time_us.is_(None)
        unless_there = statement.on_conflict_do_nothing(index_elements=["name"], index_where=is_live)
        if (await connection.execute(unless_there)).rowcount == 0:
            raise AlreadyExists(f"{message.name} exists already", metadata={"name": message.name})
        await blob_refs.refer(connection, row["uid"], self._blobs(private))
        await self._insert_labels(connection, row, message)
        return self.of_row(row)

    def statement(self, name: str) -> Select[Any]:
        """Return what finds the resource of a name that is not deleted."""
        columns = self.table.c
        return select(self.table).where(columns.name == name, columns.delete_time_us.is_(None))

    async def read(self, database: Database, name: str) -> Stored[M, P]:
        """Return the resource by one cheap read. Raises NotFound."""
        return self._one(await database.rows(self.statement(name)), name)

    async def find(self, connection: AsyncConnection, name: str) -> Stored[M, P] | None:
        """Return the resource as a transaction sees it, None when there is none of this name."""
        row = (await connection.execute(self.statement(name))).mappings().one_or_none()
        return None if row is None else self.of_row(row)

    async def get(self, connection: AsyncConnection, name: str) -> Stored[M, P]:
        """Return the resource as a transaction sees it. Raises NotFound."""
        return self._one((await connection.execute(self.statement(name))).mappings().all(), name)

    async def of_uid(self, connection: AsyncConnection, uid: str) -> Stored[M, P]:
        """Return the resource of a uid as a transaction sees it. Raises NotFound, also when it is deleted."""
        mine = (self.table.c.uid == uid, self.table.c.delete_time_us.is_(None))
        found = await connection.execute(select(self.table).where(*mine))
        return self._one(found.mappings().all(), f"the resource with uid {uid}")

    async def update(
        self, connection: AsyncConnection, old: Stored[M, P], message: M, private: P | None = None
    ) -> Stored[M, P]:
        """Store a changed resource if nobody changed it since `old` was read; return it as stored.

        Fields of progress are left as they are stored, unless the change is of them too. Raises Aborted ETAG_MISMATCH
        when the stored revision is another, and NotFound.
        """
        assert message.name == old.message.name, "a name is for ever"
        row = self._row(
            message,
            old.private if private is None else private,
            uid=old.uid,
            create_time_us=old._row["create_time_us"],
            update_time_us=self._clock_us(),
            revision=old.revision + 1,
        )
        reported = {"progress"} if row["progress"] == old._row["progress"] else set()
        await self._replace(connection, old, {key: row[key] for key in row.keys() - reported})
        if private is not None:
            before, after = self.blobs_of(old), frozenset(self._blobs(private))
            await blob_refs.refer_instead(connection, old.uid, before, after)
        if self._labels(message) != self._labels(old.message):
            await delete_labels(connection, self.table, old.uid)
            await self._insert_labels(connection, row, message)
        return self.of_row(row)

    async def report(self, connection: AsyncConnection, old: Stored[M, P], message: M) -> Stored[M, P]:
        """Store the progress fields of a message and nothing else; return it as stored. Raises as `update`.

        The revision stays, and with it the etag: who wants to change what is at work need not win a race with it.
        """
        changes = {"progress": self._progress(message), "update_time_us": self._clock_us()}
        await self._replace(connection, old, changes)
        return self.of_row({**old._row, **changes})

    async def delete(
        self, connection: AsyncConnection, old: Stored[M, P], keep_seconds: float | None = None
    ) -> Stored[M, P]:
        """Mark a resource as deleted; return it as stored. Its name may be used again.

        All of it stays so long, its blobs too, and may be brought back (`DeletedRows`). None: there is no way back, and
        what it and its parts referred to is let go. Raises as `update`.
        """
        now_us = self._clock_us()
        purge_us = None if keep_seconds is None else now_us + round(keep_seconds * 1e6)
        changes = {"delete_time_us": now_us, "purge_time_us": purge_us, "revision": old.revision + 1}
        changes["update_time_us"] = now_us
        await self._replace(connection, old, changes)
        if keep_seconds is None:
            await self.let_go(connection, old.uid)
        return self.of_row({**old._row, **changes})

    async def let_go(self, connection: AsyncConnection, uid: str) -> None:
        """Drop the labels of a resource that is gone for good, and all that it and its parts refer to."""
        await blob_refs.drop_whole(connection, uid)
        if self._has_labels:
            await delete_labels(connection, self.table, uid)

    def blobs_of(self, stored: Stored[M, P]) -> frozenset[str]:
        """Return the digests of the blobs that a resource needs."""
        return frozenset(self._blobs(stored.private))

    def page_statement(
        self,
        *,
        parent: str,
        limit: int,
        after: Cursor | None,
        equals: Mapping[str, Wanted],
        newest_first: bool,
        deleted: bool = False,
    ) -> Select[Any]:
        """Return what finds a page, less what only the service knows of its resources."""
        statement = page_statement(
            self.table,
            parent=parent,
            limit=limit,
            after=after,
            equals=equals,
            newest_first=newest_first,
            deleted=deleted,
        )
        return statement.with_only_columns(*(one for one in self.table.c if one.name != "private"))

    def page_of(self, rows: Sequence[RowMapping], limit: int) -> Page[M]:
        """Return the page that a `page_statement` of this limit found."""
        return page_of(rows, limit, self._message)

    async def _replace(
        self, connection: AsyncConnection, old: Stored[M, P], changes: Mapping[str, Any]
    ) -> None:
        assert old.message == self._message(old._row), "a stored message is never changed in place"
        assert old.private == self._private(old._row), "a stored message is never changed in place"
        columns = self.table.c
        mine = (columns.uid == old.uid, columns.delete_time_us.is_(None))
        result = await connection.execute(
            update(self.table).where(*mine, columns.revision == old.revision).values(changes)
        )
        if result.rowcount:
            return
        name = old.message.name
        revision = (await connection.execute(select(columns.revision).where(*mine))).scalar_one_or_none()
        if revision is None:
            raise _missing(name)
        raise Aborted(
            f"{name} was changed by another call: its revision is {revision}, not {old.revision}; "
            "read it again and repeat the change",
            metadata={"name": name, "etag": f'"{revision}"'},
        )

    async def first_revision(self, connection: AsyncConnection, name: str) -> int:
        """Return the revision of what has a name from now on: none that had it before had this one."""
        columns = self.table.c
        gone = (columns.name == name, columns.delete_time_us.is_not(None))
        last = await connection.execute(select(func.max(columns.revision)).where(*gone))
        return (last.scalar_one() or 0) + 1

    async def _insert_labels(self, connection: AsyncConnection, row: Mapping[str, Any], message: M) -> None:
        labels = self._labels(message)
        if labels:
            await insert_labels(connection, self.table, row, labels)

    def _labels(self, message: Any) -> Mapping[str, str]:
        return dict(message.labels) if self._has_labels else {}

    def _one(self, rows: Sequence[RowMapping], name: str) -> Stored[M, P]:
        if not rows:
            raise _missing(name)
        return self.of_row(rows[0])

    def _row(
        self, value: M, private: P, *, uid: str, create_time_us: int, update_time_us: int, revision: int
    ) -> dict[str, Any]:
        """Return the columns of a resource. `value` is its message, less what the columns alone tell."""
        message = self._message_type()
        message.CopyFrom(value)
        for told_apart in self._told_apart:
            message.ClearField(told_apart)
        message.uid = uid
        message.create_time.FromMicroseconds(create_time_us)
        return {
            "uid": uid,
            "name": value.name,
            "parent": parent_of(value.name),
            "state": self._state(value),
            "create_time_us": create_time_us,
            "update_time_us": update_time_us,
            "delete_time_us": None,
            "purge_time_us": None,
            "revision": revision,
            "message": message.SerializeToString(deterministic=True),
            "progress": self._progress(value),
            "private": private.SerializeToString(deterministic=True),
            **{column: read(value, private) for column, read in self._columns.items()},
        }

    def _state(self, message: Any) -> str:
        """Return the state's name; of one that newer code knows, its number."""
        return self._states.get(message.state, str(message.state)) if self._states else ""

    def _progress(self, value: M) -> bytes:
        """Return the fields that are stored apart: a message of the same type, which merges with the rest."""
        part: Any = self._message_type()
        for known, told in value.ListFields():
            if known.name not in self._progress_fields:
                continue
            if known.is_repeated:
                getattr(part, known.name).MergeFrom(told)
            elif known.message_type is not None:
                getattr(part, known.name).CopyFrom(told)
            else:
                setattr(part, known.name, told)
        return bytes(part.SerializeToString(deterministic=True))

    def of_row(self, row: Mapping[str, Any] | RowMapping) -> Stored[M, P]:
        """Return the resource that a row of the family's table holds."""
        return Stored(
            uid=row["uid"],
            revision=row["revision"],
            message=self._message(row),
            private=self._private(row),
            _row=row,
        )

    def _message(self, row: Mapping[str, Any] | RowMapping) -> M:
        message: Any = self._message_type.FromString(row["message"] + row["progress"])
        message.update_time.FromMicroseconds(row["update_time_us"])
        if row["delete_time_us"] is not None:
            message.delete_time.FromMicroseconds(row["delete_time_us"])
        if row["purge_time_us"]:
            message.purge_time.FromMicroseconds(row["purge_time_us"])
        message.etag = f'"{row["revision"]}"'
        return cast(M, message)

    def _private(self, row: Mapping[str, Any] | RowMapping) -> P:
        return self._private_type.FromString(row["private"])


def _missing(name: str) -> NotFound:
    return NotFound(f"{name} does not exist", metadata={"name": name})
