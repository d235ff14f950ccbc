"""What needs which blob, read from the resources themselves: what the rows of `storage.blob_refs` must say."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import RowMapping, Table, select
from sqlalchemy.ext.asyncio import AsyncConnection

from luthier.storage.deleted import is_kept
from luthier.storage.stored import Rows

_ROWS_AT_ONCE = 200
_CERTAIN = "is_certain"


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """One blob that something needs.

    Attributes:
        owner: as the row of references must say.
        name: what needs it, in words for people: the name of a resource, with what of it.
        digest: of the blob.
        is_certain: whether there must be such a row. Not while what needs it is purged: its rows go in turn.
    """

    owner: str
    name: str
    digest: str
    is_certain: bool = True


Needs = Callable[[AsyncConnection], AsyncIterator[Need]]
"""Yields all that a service's resources need, as one transaction sees it."""


async def needs_of(connection: AsyncConnection, *families: Rows[Any, Any]) -> AsyncIterator[Need]:
    """Yield what the resources of some families need, those that are deleted too, less what their parts do."""
    for rows in families:
        after = ""
        while found := await _rows_after(connection, rows.table, after):
            for need in (need for row in found for need in _needs_of_row(rows, row)):
                yield need
            after = found[-1]["uid"]


def _needs_of_row(rows: Rows[Any, Any], row: RowMapping) -> Iterator[Need]:
    stored, is_certain = rows.of_row(row), bool(row[_CERTAIN])
    for digest in rows.blobs_of(stored):
        yield Need(owner=stored.uid, name=stored.message.name, digest=digest, is_certain=is_certain)


async def _rows_after(connection: AsyncConnection, table: Table, after: str) -> Sequence[RowMapping]:
    statement = select(table, is_kept(table).label(_CERTAIN)).where(table.c.uid > after)
    found = await connection.execute(statement.order_by(table.c.uid).limit(_ROWS_AT_ONCE))
    return found.mappings().all()
