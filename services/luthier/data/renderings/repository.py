"""Renderings in SQL, and the records that they could not render."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from sqlalchemy import insert, select
from sqlalchemy.ext.asyncio import AsyncConnection

from luthier.data import schema
from luthier.data.renderings.domain import RefusedRecord, Rendering
from luthier.storage.resources import Resources


def renderings() -> Resources[Rendering]:
    """Return the stored renderings."""
    return Resources(schema.renderings, Rendering)


class RenderingErrors:
    """The records that renderings could not render, in the order in which they were found."""

    async def add(self, connection: AsyncConnection, rendering: str, errors: Sequence[RefusedRecord]) -> None:
        """Store the errors of a rendering that has none yet."""
        rows = [
            {"rendering": rendering, "position": position, **asdict(error)}
            for position, error in enumerate(errors)
        ]
        if rows:
            await connection.execute(insert(schema.rendering_errors), rows)

    async def page(
        self, connection: AsyncConnection, rendering: str, start: int, limit: int
    ) -> list[RefusedRecord]:
        """Return at most `limit` errors of a rendering from position `start` on."""
        columns = schema.rendering_errors.c
        statement = (
            select(schema.rendering_errors)
            .where(columns.rendering == rendering, columns.position >= start)
            .order_by(columns.position)
            .limit(limit)
        )
        return [
            RefusedRecord(filename=row.filename, line=row.line, reason=row.reason, message=row.message)
            for row in await connection.execute(statement)
        ]
