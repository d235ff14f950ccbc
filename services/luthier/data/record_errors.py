"""The records that a version or a rendering could not take, in SQL, in the order in which they were found."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import insert, select
from sqlalchemy.ext.asyncio import AsyncConnection

from luthier.data import schema
from luthier.v1.dataset_pb2 import RecordError


async def add_errors(connection: AsyncConnection, owner: str, errors: Sequence[RecordError]) -> None:
    """Store the errors of a resource that has none yet, by its uid."""
    rows = [
        {"owner": owner, "position": position, "message": error.SerializeToString(deterministic=True)}
        for position, error in enumerate(errors)
    ]
    if rows:
        await connection.execute(insert(schema.record_errors), rows)


async def page_of_errors(
    connection: AsyncConnection, owner: str, start: int, limit: int
) -> list[RecordError]:
    """Return at most `limit` errors of a resource from position `start` on."""
    columns = schema.record_errors.c
    statement = (
        select(columns.message)
        .where(columns.owner == owner, columns.position >= start)
        .order_by(columns.position)
        .limit(limit)
    )
    return [RecordError.FromString(stored) for stored in (await connection.execute(statement)).scalars()]
