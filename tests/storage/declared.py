"""The tables of a database that several packages share."""

from __future__ import annotations

from sqlalchemy import MetaData


def declared(*parts: MetaData) -> MetaData:
    """Return the tables of all parts together, to compare a migrated database with."""
    whole = MetaData()
    for part in parts:
        for table in part.tables.values():
            table.to_metadata(whole)
    return whole
