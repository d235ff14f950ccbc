"""Which database this is: by an id that it was given when it was made, and keeps wherever it is copied or restored."""

from __future__ import annotations

from sqlalchemy import Column, MetaData, String, Table, select
from sqlalchemy.ext.asyncio import AsyncConnection

metadata = MetaData()
"""Part of every database with tasks: `work.schema` takes the table over."""

database_identity = Table(
    "database_identity",
    metadata,
    Column("database_id", String, primary_key=True),
)


async def database_id(connection: AsyncConnection) -> str:
    """Return the id of the database."""
    return str((await connection.execute(select(database_identity.c.database_id))).scalar_one())
