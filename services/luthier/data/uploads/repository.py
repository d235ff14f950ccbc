"""Uploads in SQL, and which of them have bytes staged in the blob store."""

from __future__ import annotations

from sqlalchemy import delete, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from luthier.data import schema
from luthier.storage.stored import Rows
from luthier.stored.v1.data_pb2 import UploadPrivate
from luthier.v1.upload_pb2 import Upload

UploadRows = Rows[Upload, UploadPrivate]


def uploads() -> UploadRows:
    """Return the stored uploads."""
    return Rows(schema.uploads, Upload, UploadPrivate)


class StagedUploads:
    """Uploads, by uid, whose staged bytes are not yet cleared away: what a crash may leave half done."""

    async def add(self, connection: AsyncConnection, uid: str) -> None:
        """Remember that bytes may be staged for an upload."""
        await connection.execute(insert(schema.staged_uploads).values(uid=uid, finishing=False))

    async def set_finishing(self, connection: AsyncConnection, uid: str, finishing: bool) -> None:
        """Remember whether the bytes are on their way to become a blob."""
        columns = schema.staged_uploads.c
        await connection.execute(
            update(schema.staged_uploads).where(columns.uid == uid).values(finishing=finishing)
        )

    async def is_finishing(self, connection: AsyncConnection, uid: str) -> bool:
        """Tell whether the bytes are on their way to become a blob."""
        columns = schema.staged_uploads.c
        found = await connection.execute(select(columns.finishing).where(columns.uid == uid))
        return bool(found.scalar_one_or_none())

    async def remove(self, connection: AsyncConnection, uid: str) -> None:
        """Forget an upload whose staged bytes are cleared away."""
        await connection.execute(delete(schema.staged_uploads).where(schema.staged_uploads.c.uid == uid))

    async def finishing(self, connection: AsyncConnection) -> list[str]:
        """Return the names of the uploads that are RECEIVING and whose bytes are on their way to become a blob."""
        uploads, staged = schema.uploads.c, schema.staged_uploads
        statement = (
            select(uploads.name)
            .join(staged, staged.c.uid == uploads.uid)
            .where(uploads.state == "RECEIVING", uploads.delete_time_us.is_(None), staged.c.finishing)
        )
        return list((await connection.execute(statement)).scalars())

    async def ended(self, connection: AsyncConnection) -> list[tuple[str, str]]:
        """Return name and uid of the uploads that are COMPLETE or CANCELLED and may have staged bytes.

        One that is purged has its uid for a name.
        """
        uploads, staged = schema.uploads.c, schema.staged_uploads
        statement = (
            select(func.coalesce(uploads.name, staged.c.uid).label("name"), staged.c.uid)
            .join_from(staged, schema.uploads, staged.c.uid == uploads.uid, isouter=True)
            .where(func.coalesce(uploads.state, "") != "RECEIVING")
        )
        return [(row.name, row.uid) for row in await connection.execute(statement)]
