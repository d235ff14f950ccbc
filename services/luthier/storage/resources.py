"""Resources in SQL: one table a family, one frozen dataclass a row, compare-and-set on the revision.

What is searched or ordered by has a column; the rest of the dataclass is one JSON `body`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from sqlalchemy import JSON, BigInteger, Column, Integer, MetaData, String, Table, select, tuple_, update
from sqlalchemy.dialects import sqlite
from sqlalchemy.engine import RowMapping
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.sql.elements import ColumnElement

from luthier.errors import Aborted, AlreadyExists, NotFound
from luthier.storage.bodies import Bodies

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Cursor:
    """Where a page ended: the creation time (microseconds since 1970) and name of its last resource."""

    create_time_us: int
    name: str

    def parts(self) -> tuple[str, str]:
        """Return the cursor as strings, for a page token."""
        return str(self.create_time_us), self.name

    @classmethod
    def of(cls, parts: Sequence[str]) -> "Cursor":
        """Return the cursor that `parts` came from."""
        create_time_us, name = parts
        return cls(create_time_us=int(create_time_us), name=name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Page(Generic[T]):
    """Some resources in order, and where the next page starts: None after the last one."""

    values: tuple[T, ...]
    next: Cursor | None


def resource_table(name: str, metadata: MetaData, *extra_columns: Column[Any]) -> Table:
    """Return the table of a resource family. An extra column holds the attribute of its name."""
    return Table(
        name,
        metadata,
        Column("name", String, primary_key=True),
        Column("parent", String, nullable=False, index=True),
        Column("uid", String, nullable=False),
        Column("state", String, nullable=False),
        Column("labels", JSON, nullable=False),
        Column("create_time_us", BigInteger, nullable=False),
        Column("update_time_us", BigInteger, nullable=False),
        Column("revision", Integer, nullable=False),
        Column("body", JSON, nullable=False),
        *extra_columns,
    )


def parent_of(name: str) -> str:
    """Return the name less its last collection and id: `projects/p` for `projects/p/datasets/d`."""
    return "/".join(name.split("/")[:-2])


def _now() -> datetime:
    return datetime.now(UTC)


class Resources(Generic[T]):
    """The resources of one family, as values of `type_`. Holds no connection: every call is given one."""

    def __init__(self, table: Table, type_: type[T], *, clock: Callable[[], datetime] = _now) -> None:
        self._table = table
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

    async def find(self, connection: AsyncConnection, name: str) -> T | None:
        """Return the resource, None when there is none of this name."""
        result = await connection.execute(select(self._table).where(self._table.c.name == name))
        row = result.mappings().one_or_none()
        return None if row is None else self._value(row)

    async def get(self, connection: AsyncConnection, name: str) -> T:
        """Return the resource. Raises NotFound."""
        value = await self.find(connection, name)
        if value is None:
            raise NotFound(f"{name} does not exist", metadata={"name": name})
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
        changed = replace(value, revision=revision, update_time=self._clock())
        columns = self._table.c
        result = await connection.execute(
            update(self._table)
            .where(columns.name == value.name, columns.revision == value.revision)
            .values(self._row(changed))
        )
        if result.rowcount == 1:
            return changed
        stored = await self.get(connection, value.name)
        raise Aborted(
            f"{value.name} was changed by another call: its revision is {stored.revision}, not "
            f"{value.revision}; read it again and repeat the change",
            metadata={"name": value.name, "etag": f'"{stored.revision}"'},
        )

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

        `equals` filters by `state`, `labels.<key>` and extra columns; another name raises ValueError.
        """
        columns = self._table.c
        keys = (columns.create_time_us, columns.name)
        statement = select(self._table).where(columns.parent == parent)
        for field, wanted in (equals or {}).items():
            statement = statement.where(self._column(field) == wanted)
        if after is not None:
            last = tuple_(after.create_time_us, after.name)
            statement = statement.where(tuple_(*keys) < last if newest_first else tuple_(*keys) > last)
        order = [key.desc() if newest_first else key.asc() for key in keys]
        result = await connection.execute(statement.order_by(*order).limit(limit + 1))
        rows = result.mappings().all()
        values = tuple(self._value(row) for row in rows[:limit])
        if len(rows) <= limit:
            return Page(values=values, next=None)
        end = rows[limit - 1]
        return Page(values=values, next=Cursor(create_time_us=end["create_time_us"], name=end["name"]))

    def _column(self, field: str) -> ColumnElement[Any]:
        if field.startswith("labels."):
            labels = self._table.c.labels
            label: ColumnElement[Any] = labels[field.removeprefix("labels.")].as_string()
            return label
        if field != "state" and field not in self._extra:
            known = ", ".join(["state", "labels.<key>", *self._extra])
            raise ValueError(f"a filter on {self._table.name} must be one of {known}, got {field!r}")
        column: ColumnElement[Any] = self._table.c[field]
        return column

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


def _microseconds(time: datetime) -> int:
    assert time.tzinfo is not None, "times are aware"
    return (time - _EPOCH) // timedelta(microseconds=1)


def _time(microseconds: int) -> datetime:
    return _EPOCH + timedelta(microseconds=microseconds)
