"""Resources in SQL: one table a family, one frozen dataclass a row, compare-and-set on the revision.

What is searched or ordered by has a column, and an index in the order of pages: a page costs a page, however many
resources there are. Labels have rows of their own beside it. The rest of the dataclass is one JSON `body`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    Index,
    Integer,
    MetaData,
    Select,
    String,
    Table,
    delete,
    select,
    update,
)
from sqlalchemy.dialects import sqlite
from sqlalchemy.engine import RowMapping
from sqlalchemy.ext.asyncio import AsyncConnection

from luthier.errors import Aborted, AlreadyExists, NotFound
from luthier.storage.bodies import Bodies
from luthier.storage.pages import (
    FILTERS,
    LABELS,
    Cursor,
    Page,
    insert_labels,
    labels_table,
    page_of,
    page_statement,
    parent_of,
)

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_OWN_COLUMNS = frozenset({"name", "uid", "state", "labels", "create_time", "update_time", "revision"})


class Resource(Protocol):
    """The fields that every stored dataclass has. It is frozen; times are aware; `revision` starts at 1."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def name(self) -> str:
        """Resource name (`projects/p/datasets/d`)."""

    @property
    def uid(self) -> str:
        """Unique for all time, also when a name is used again."""

    @property
    def state(self) -> str:
        """A `StrEnum` member."""

    @property
    def labels(self) -> Mapping[str, str]:
        """Labels by key."""

    @property
    def create_time(self) -> datetime:
        """When it was made."""

    @property
    def update_time(self) -> datetime:
        """When it was last changed."""

    @property
    def revision(self) -> int:
        """Counts changes from 1, reports of progress aside. The etag is made of it."""


T = TypeVar("T", bound=Resource)


def resource_table(name: str, metadata: MetaData, *extra_columns: Column[Any]) -> Table:
    """Return the table of a resource family. An extra column holds the attribute of its name, to filter by.

    Beside it stands the table `<name>_labels`, a row for each label of each resource.
    """
    labels = labels_table(name, metadata)
    filters = ("state", *(column.name for column in extra_columns))
    return Table(
        name,
        metadata,
        Column("name", String, primary_key=True),
        Column("parent", String, nullable=False),
        Column("uid", String, nullable=False),
        Column("state", String, nullable=False),
        Column("labels", JSON, nullable=False),
        Column("create_time_us", BigInteger, nullable=False),
        Column("update_time_us", BigInteger, nullable=False),
        Column("revision", Integer, nullable=False),
        Column("body", JSON, nullable=False),
        *extra_columns,
        Index(f"ix_{name}_page", "parent", "create_time_us", "name"),
        *(Index(f"ix_{name}_{column}", "parent", column, "create_time_us", "name") for column in filters),
        info={LABELS: labels, FILTERS: filters},
    )


def require_etag(value: Resource, etag: str) -> None:
    """Raise Aborted ETAG_MISMATCH unless an etag is the resource's own; the empty one is any resource's."""
    if etag and etag != f'"{value.revision}"':
        raise Aborted(
            f'{value.name} has the etag "{value.revision}", got {etag}; read it again',
            metadata={"name": value.name, "etag": f'"{value.revision}"'},
        )


def _now() -> datetime:
    return datetime.now(UTC)


class Resources(Generic[T]):
    """The resources of one family, as values of `type_`. Holds no connection: every call is given one."""

    def __init__(self, table: Table, type_: type[T], *, clock: Callable[[], datetime] = _now) -> None:
        self._table = table
        self._labels: Table = table.info[LABELS]
        self._type = type_
        self._clock = clock
        names = {field.name for field in fields(type_)}
        assert names >= _OWN_COLUMNS, f"{type_.__name__} lacks {sorted(_OWN_COLUMNS - names)}"
        standard = {"parent", "create_time_us", "update_time_us", "body"} | _OWN_COLUMNS
        self._extra = tuple(column.name for column in table.columns if column.name not in standard)
        self._bodies = Bodies(type_, names - _OWN_COLUMNS)

    async def insert(self, connection: AsyncConnection, value: T) -> None:
        """Store a new resource. Raises AlreadyExists when one of this name is there."""
        statement = sqlite.insert(self._table).values(self._row(value))
        result = await connection.execute(statement.on_conflict_do_nothing(index_elements=["name"]))
        if result.rowcount == 0:
            raise AlreadyExists(f"{value.name} exists already", metadata={"name": value.name})
        await self._insert_labels(connection, value)

    async def find(self, connection: AsyncConnection, name: str) -> T | None:
        """Return the resource, None when there is none of this name."""
        result = await connection.execute(select(self._table).where(self._table.c.name == name))
        row = result.mappings().one_or_none()
        return None if row is None else self._value(row)

    async def get(self, connection: AsyncConnection, name: str) -> T:
        """Return the resource. Raises NotFound."""
        value = await self.find(connection, name)
        if value is None:
            raise _missing(name)
        return value

    async def update(self, connection: AsyncConnection, value: T) -> T:
        """Store a changed resource if nobody changed it since it was read; return it as stored.

        Raises Aborted ETAG_MISMATCH when the stored revision is another than `value.revision`, and NotFound.
        """
        return await self._store(connection, value, value.revision + 1)

    async def report(self, connection: AsyncConnection, value: T) -> T:
        """Store how far a resource has come, and nothing else; return it as stored. Raises as `update`.

        The revision stays, and with it the etag: who wants to change what is at work need not win a race with it.
        """
        return await self._store(connection, value, value.revision)

    async def _store(self, connection: AsyncConnection, value: T, revision: int) -> T:
        columns = self._table.c
        known = select(columns.revision, columns.labels).where(columns.name == value.name)
        stored = (await connection.execute(known)).one_or_none()
        if stored is None:
            raise _missing(value.name)
        changed = replace(value, revision=revision, update_time=self._clock())
        result = await connection.execute(
            update(self._table)
            .where(columns.name == value.name, columns.revision == value.revision)
            .values(self._row(changed))
        )
        if result.rowcount == 0:
            raise Aborted(
                f"{value.name} was changed by another call: its revision is {stored.revision}, not "
                f"{value.revision}; read it again and repeat the change",
                metadata={"name": value.name, "etag": f'"{stored.revision}"'},
            )
        if dict(changed.labels) != stored.labels:
            await connection.execute(delete(self._labels).where(self._labels.c.name == value.name))
            await self._insert_labels(connection, changed)
        return changed

    async def page(
        self,
        connection: AsyncConnection,
        *,
        parent: str,
        limit: int,
        after: Cursor | None = None,
        equals: Mapping[str, str] | None = None,
        newest_first: bool = True,
    ) -> Page[T]:
        """Return at most `limit` resources directly below `parent`, ordered by creation time and name.

        `equals` filters by `state`, `labels.<key>` and extra columns; another name raises ValueError. With one
        field to filter by, the rows read are those of the page; with several, those that the first label, or one
        of the columns, leaves.
        """
        statement = self.page_statement(
            parent=parent, limit=limit, after=after, equals=equals or {}, newest_first=newest_first
        )
        return self.page_of((await connection.execute(statement)).mappings().all(), limit)

    def page_of(self, rows: Sequence[RowMapping], limit: int) -> Page[T]:
        """Return the page that a `page_statement` of this limit found."""
        return page_of(rows, limit, self._value)

    def page_statement(
        self, *, parent: str, limit: int, after: Cursor | None, equals: Mapping[str, str], newest_first: bool
    ) -> Select[Any]:
        """Return what `page` asks the database for: one row more than the page, which tells of a next one."""
        return page_statement(
            self._table, parent=parent, limit=limit, after=after, equals=equals, newest_first=newest_first
        )

    async def _insert_labels(self, connection: AsyncConnection, value: T) -> None:
        create_time_us = _microseconds(value.create_time)
        await insert_labels(connection, self._table, value.name, create_time_us, value.labels)

    def _row(self, value: T) -> dict[str, Any]:
        return {
            "name": value.name,
            "parent": parent_of(value.name),
            "uid": value.uid,
            "state": str(value.state),
            "labels": dict(value.labels),
            "create_time_us": _microseconds(value.create_time),
            "update_time_us": _microseconds(value.update_time),
            "revision": value.revision,
            "body": self._bodies.to_json(value),
            **{name: getattr(value, name) for name in self._extra},
        }

    def _value(self, row: RowMapping) -> T:
        return self._bodies.from_json(
            row["body"],
            {
                "name": row["name"],
                "uid": row["uid"],
                "state": row["state"],
                "labels": row["labels"],
                "create_time": _time(row["create_time_us"]),
                "update_time": _time(row["update_time_us"]),
                "revision": row["revision"],
            },
        )


def _missing(name: str) -> NotFound:
    return NotFound(f"{name} does not exist", metadata={"name": name})


def _microseconds(time: datetime) -> int:
    assert time.tzinfo is not None, "times are aware"
    return (time - _EPOCH) // timedelta(microseconds=1)


def _time(microseconds: int) -> datetime:
    return _EPOCH + timedelta(microseconds=microseconds)
