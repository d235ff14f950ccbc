"""Pages of resources: the order they come in, where a page ends, and what the database is asked for.

What is searched or ordered by has a column, and an index in the order of pages: a page costs a page, however many
resources there are. Labels have rows of their own in a table beside that of their resources.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from sqlalchemy import (
    BigInteger,
    Column,
    Index,
    MetaData,
    Select,
    String,
    Table,
    delete,
    exists,
    insert,
    select,
    tuple_,
)
from sqlalchemy.engine import RowMapping
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.sql.elements import ColumnElement

from luthier.storage.dialect import WITHOUT_ROWID

LABELS = "labels"
"""Key of a family's table under which its table of labels is found (`Table.info`)."""
FILTERS = "filters"
"""Key under which the columns to filter by are found, labels aside."""

T = TypeVar("T")
Wanted = str | tuple[str, ...]
"""What a column must hold: a value, or one of several."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cursor:
    """Where a page ended: the creation time (microseconds since 1970) and name of its last resource."""

    create_time_us: int
    name: str

    def parts(self) -> tuple[str, str]:
        """Return the cursor as strings, for a page token."""
        return str(self.create_time_us), self.name

    @classmethod
    def of(cls, parts: Sequence[str]) -> Cursor:
        """Return the cursor that `parts` came from."""
        create_time_us, name = parts
        return cls(create_time_us=int(create_time_us), name=name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Page(Generic[T]):
    """Some resources in order, and where the next page starts: None after the last one."""

    values: tuple[T, ...]
    next: Cursor | None


def parent_of(name: str) -> str:
    """Return the name less its last collection and id: `projects/p` for `projects/p/datasets/d`."""
    return "/".join(name.split("/")[:-2])


def labels_table(name: str, metadata: MetaData) -> Table:
    """Return the table `<name>_labels`: a row for each label of each resource of the family `name`, by uid.

    The names are there for the order of pages.
    """
    return Table(
        f"{name}_labels",
        metadata,
        *(Column(column, String, primary_key=True) for column in ("parent", "key", "value")),
        Column("create_time_us", BigInteger, primary_key=True, autoincrement=False),
        Column("name", String, primary_key=True),
        Column("uid", String, primary_key=True),
        Index(f"ix_{name}_labels_uid", "uid"),
        **WITHOUT_ROWID,
    )


async def insert_labels(
    connection: AsyncConnection, table: Table, row: Mapping[str, Any], labels: Mapping[str, str]
) -> None:
    """Store the labels of a resource that has none; `row` is its own."""
    place = {column: row[column] for column in ("uid", "parent", "create_time_us", "name")}
    rows = [{**place, "key": key, "value": value} for key, value in labels.items()]
    if rows:
        await connection.execute(insert(table.info[LABELS]), rows)


async def delete_labels(connection: AsyncConnection, table: Table, uid: str) -> None:
    """Delete the labels of the resource of a uid."""
    labels: Table = table.info[LABELS]
    await connection.execute(delete(labels).where(labels.c.uid == uid))


def page_statement(
    table: Table,
    *,
    parent: str,
    limit: int,
    after: Cursor | None,
    equals: Mapping[str, Wanted],
    newest_first: bool,
    deleted: bool = False,
) -> Select[Any]:
    """Return what finds a page of the resources directly below `parent`: one row more, which tells of a next page.

    They are ordered by creation time and name; deleted ones are left out, or where `deleted` they alone are found that
    are not being purged. `equals` filters by `labels.<key>` and by the table's own columns for it; another name raises
    ValueError. Of several values, any will do. With one field to filter by, the rows read
    are those of the page; with several, those that the first label, or one of the columns, leaves.
    """
    labels = {
        field.removeprefix("labels."): wanted
        for field, wanted in equals.items()
        if field.startswith("labels.") and isinstance(wanted, str)
    }
    first, *others = labels.items() or [None]
    ordered = table if first is None else table.info[LABELS].alias("ordered")
    statement = select(table).where(ordered.c.parent == parent)
    if deleted:
        statement = statement.where(table.c.delete_time_us.is_not(None), table.c.purge_time_us > 0)
    elif "delete_time_us" in table.c:
        statement = statement.where(table.c.delete_time_us.is_(None))
    if first is not None:
        statement = statement.where(
            ordered.c.key == first[0], ordered.c.value == first[1], table.c.uid == ordered.c.uid
        )
    for label in others:
        assert label is not None, "only the first may be missing"
        statement = statement.where(_has_label(table, parent, *label))
    for field, wanted in equals.items():
        if not field.startswith("labels."):
            column = _column(table, field)
            statement = statement.where(column == wanted if isinstance(wanted, str) else column.in_(wanted))
    keys = (ordered.c.create_time_us, ordered.c.name)
    if after is not None:
        last = tuple_(after.create_time_us, after.name)
        statement = statement.where(tuple_(*keys) < last if newest_first else tuple_(*keys) > last)
    return statement.order_by(*(key.desc() if newest_first else key.asc() for key in keys)).limit(limit + 1)


def page_of(rows: Sequence[RowMapping], limit: int, read: Callable[[RowMapping], T]) -> Page[T]:
    """Return the page that a `page_statement` of this limit found."""
    values = tuple(read(row) for row in rows[:limit])
    if len(rows) <= limit:
        return Page(values=values, next=None)
    end = rows[limit - 1]
    return Page(values=values, next=Cursor(create_time_us=end["create_time_us"], name=end["name"]))


def _has_label(table: Table, parent: str, key: str, wanted: str) -> ColumnElement[bool]:
    columns, mine = table.info[LABELS].c, table.c
    return exists().where(
        columns.parent == parent,
        columns.key == key,
        columns.value == wanted,
        columns.create_time_us == mine.create_time_us,
        columns.name == mine.name,
        columns.uid == mine.uid,
    )


def _column(table: Table, field: str) -> ColumnElement[Any]:
    filters = table.info[FILTERS]
    if field not in filters:
        known = ", ".join([*filters[:1], "labels.<key>", *filters[1:]])
        raise ValueError(f"a filter on {table.name} must be one of {known}, got {field!r}")
    column: ColumnElement[Any] = table.c[field]
    return column
