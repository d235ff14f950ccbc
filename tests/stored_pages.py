"""A page of stored resources, as lists of the services read it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from sqlalchemy.ext.asyncio import AsyncConnection

from luthier.storage.pages import Cursor, Page
from luthier.storage.resource_messages import ResourceMessage
from luthier.storage.stored import Rows

M = TypeVar("M", bound=ResourceMessage)


async def page_of(
    rows: Rows[M, Any],
    connection: AsyncConnection,
    parent: str,
    limit: int,
    *,
    after: Cursor | None = None,
    equals: Mapping[str, str] | None = None,
    newest_first: bool = True,
) -> Page[M]:
    statement = rows.page_statement(
        parent=parent, limit=limit, after=after, equals=equals or {}, newest_first=newest_first
    )
    return rows.page_of((await connection.execute(statement)).mappings().all(), limit)
