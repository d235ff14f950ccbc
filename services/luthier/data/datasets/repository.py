"""Datasets, versions and the errors of versions in SQL."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from sqlalchemy import insert, select
from sqlalchemy.ext.asyncio import AsyncConnection

from luthier.data import schema
from luthier.data.datasets.domain import Dataset, DatasetVersion, RecordError
from luthier.storage.resources import Resources


def datasets() -> Resources[Dataset]:
    """Return the stored datasets."""
    return Resources(schema.datasets, Dataset)


def versions() -> Resources[DatasetVersion]:
    """Return the stored versions."""
    return Resources(schema.dataset_versions, DatasetVersion)


class VersionErrors:
    """The bad records of versions, in the order in which they were found."""

    async def add(self, connection: AsyncConnection, version: str, errors: Sequence[RecordError]) -> None:
        """Store the errors of a version that has none yet."""
        rows = [
            {"version": version, "position": position, **asdict(error)}
            for position, error in enumerate(errors)
        ]
        if rows:
            await connection.execute(insert(schema.dataset_version_errors), rows)

    async def page(
        self, connection: AsyncConnection, version: str, start: int, limit: int
    ) -> list[RecordError]:
        """Return at most `limit` errors of a version from position `start` on."""
        columns = schema.dataset_version_errors.c
        statement = (
            select(schema.dataset_version_errors)
            .where(columns.version == version, columns.position >= start)
            .order_by(columns.position)
            .limit(limit)
        )
        return [
            RecordError(
                filename=row.filename,
                line=row.line,
                path=row.path,
                reason=row.reason,
                message=row.message,
                value=row.value,
            )
            for row in await connection.execute(statement)
        ]
