"""Bytes of checkpoints and rollouts that are no longer kept: given back once nothing names them or is on its way to.

A worker that was told that the service has a blob names it a moment later, in a checkpoint that is then refused if
the blob is gone, and sends it again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from sqlalchemy import delete, func, select
from sqlalchemy.dialects import sqlite
from sqlalchemy.ext.asyncio import AsyncConnection

from luthier.storage.blobs import BlobStore
from luthier.storage.database import Database
from luthier.training.schema import checkpoints, fine_tuning_jobs, models, released_blobs, rollouts

GRACE_SECONDS = 900.0
_SWEPT_AT_ONCE = 64


class ReleasedBlobs:
    """Blobs that a dropped checkpoint named, or that held dropped rollouts."""

    def __init__(self, database: Database, blobs: BlobStore, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._blobs = blobs
        self._clock = clock

    async def release(self, connection: AsyncConnection, digests: Iterable[str]) -> None:
        """Note blobs for `sweep`, in the transaction that drops what named them."""
        now_us = round(self._clock() * 1e6)
        rows = [{"digest": digest, "release_time_us": now_us} for digest in sorted(set(digests))]
        if rows:
            statement = sqlite.insert(released_blobs)
            again = statement.on_conflict_do_update(
                index_elements=["digest"], set_={"release_time_us": statement.excluded.release_time_us}
            )
            await connection.execute(again, rows)

    async def sweep(self) -> None:
        """Delete what was released `GRACE_SECONDS` ago and is named by nothing: by no job that begins from it either.

        The bytes go inside the transaction that looked: nothing can be committed in between. A deleted job may leave a
        file for each of its steps: these go some at a time, and others write in between.
        """
        while await self._sweep_some():
            pass

    async def _sweep_some(self) -> bool:
        """Delete the first that are due; returns whether there may be more."""
        column = released_blobs.c
        before_us = round((self._clock() - GRACE_SECONDS) * 1e6)
        due = select(column.digest).where(column.release_time_us <= before_us).limit(_SWEPT_AT_ONCE)
        async with self._database.reading() as connection:
            if (await connection.execute(due)).first() is None:
                return False
        async with self._database.transaction() as connection:
            digests = (await connection.execute(due)).scalars().all()
            for digest in digests:
                if not await _named(connection, digest):
                    await self._blobs.delete(digest)
                await connection.execute(delete(released_blobs).where(column.digest == digest))
        return len(digests) == _SWEPT_AT_ONCE


async def _named(connection: AsyncConnection, digest: str) -> bool:
    for stored in (checkpoints.c.private, models.c.private, fine_tuning_jobs.c.private):
        # Digests stand in the serialised message as they are written.
        names_it = func.instr(stored, digest.encode()) > 0
        if (await connection.execute(select(1).where(names_it).select_from(stored.table).limit(1))).first():
            return True
    holds_rollouts = select(1).where(rollouts.c.digest == digest).limit(1)
    return (await connection.execute(holds_rollouts)).first() is not None
