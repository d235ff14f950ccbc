"""Blobs that a worker was told are there, or sends: kept for its task until it has named them, or its attempt ends."""

from __future__ import annotations

from collections.abc import Collection

from google.protobuf.message import Message
from sqlalchemy.ext.asyncio import AsyncConnection

from luthier.storage import blob_refs
from luthier.storage.blob_refs import digests_in, task_owner
from luthier.storage.blobs import check_digest
from luthier.storage.database import Database
from luthier.work.repository import Tasks


class PromisedBlobs:
    """What the tasks of one service refer to. `Tasks` lets go all of a task whose attempt is over."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._tasks = Tasks()

    async def keep(self, task_id: str, epoch: int, digests: Collection[str]) -> None:
        """Keep blobs for a task, whether they are there already or not; they stay from the commit on.

        Raises:
            InvalidArgument: one is no digest.
            FailedPrecondition: LEASE_LOST.
        """
        wanted, owner = [check_digest(digest) for digest in digests], task_owner(task_id)
        async with self._database.reading() as connection:
            await self._tasks.held(connection, task_id, epoch)
            if await blob_refs.referred(connection, owner, wanted):
                return
        async with self._database.transaction() as connection:
            await self._tasks.held(connection, task_id, epoch)
            await blob_refs.refer(connection, owner, wanted)

    async def named(self, connection: AsyncConnection, task_id: str, message: Message) -> None:
        """Let go what a worker has named: from now on it is kept by what was made of it, or by nothing."""
        await blob_refs.drop_some(connection, task_owner(task_id), digests_in(message))
