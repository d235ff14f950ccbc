"""Purging what was deleted long ago, or was given up: a batch a transaction, so that others write in between."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Column, Select, and_, delete, exists, or_, select, tuple_
from sqlalchemy.ext.asyncio import AsyncConnection

from luthier.storage.database import Database
from luthier.storage.deleted import DeletedRows
from luthier.storage.stored import Rows
from luthier.work.holds import Holds
from luthier.work.schema import deliveries, events, holds, tasks
from luthier.work.undeleting import KEEP_SECONDS

PURGE_BATCH = 500
"""Rows that one transaction deletes at most."""
_RESOURCES_AT_ONCE = 100
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Purged:
    """A family whose resources are purged, and what goes with each.

    Attributes:
        rows: its resources.
        parts: for each table with rows of theirs, the column that has the uid.
    """

    rows: Rows[Any, Any]
    parts: Sequence[Column[Any]] = ()


class Purging:
    """Deletes all that there is of what was deleted for long enough and is needed by nothing that may come back."""

    def __init__(
        self, database: Database, families: Sequence[Purged], clock: Callable[[], float] = time.time
    ) -> None:
        self._database = database
        self._families = families
        self._clock = clock
        self._holds = Holds()

    async def sweep(self) -> None:
        """Purge what is due. Where one cannot be purged, the others are all the same; the next sweep tries again."""
        for family in self._families:
            failed: set[str] = set()
            while uids := [uid for uid in await self._due(family) if uid not in failed]:
                for uid in uids:
                    try:
                        await self._purge(family, uid)
                    except Exception:  # whatever it is: it is of this resource
                        failed.add(uid)
                        _logger.exception("%s %s cannot be purged", family.rows.table.name, uid)

    async def _due(self, family: Purged) -> Sequence[str]:
        statement = self._due_statement(family).limit(_RESOURCES_AT_ONCE)
        return [row["uid"] for row in await self._database.rows(statement)]

    def _due_statement(self, family: Purged) -> Select[Any]:
        columns, now_us = family.rows.table.c, round(self._clock() * 1e6)
        # What was deleted before deletions could be undone has no time of its own.
        former = and_(
            columns.purge_time_us.is_(None), columns.delete_time_us <= now_us - round(KEEP_SECONDS * 1e6)
        )
        is_held = exists().where(holds.c.held == columns.uid)
        due = (columns.delete_time_us.is_not(None), or_(columns.purge_time_us <= now_us, former), ~is_held)
        return select(columns.uid).where(*due)

    async def _purge(self, family: Purged, uid: str) -> None:
        deleted = DeletedRows(family.rows)
        async with self._database.transaction(makes_room=True) as connection:
            still = self._due_statement(family).where(family.rows.table.c.uid == uid)
            if (await connection.execute(still)).first() is None:
                return  # it was brought back, or something that needs it was
            await deleted.give_up(connection, uid)
        for owner in (*family.parts, events.c.uid):
            while await self._delete_some(owner, uid):
                pass
        async with self._database.transaction(makes_room=True) as connection:
            for owner in (tasks.c.uid, deliveries.c.uid):
                await connection.execute(delete(owner.table).where(owner == uid))
            await self._holds.drop(connection, uid)
            await deleted.purge(connection, uid)
        _logger.info("purged", extra={"family": family.rows.table.name, "uid": uid})

    async def _delete_some(self, owner: Column[Any], uid: str) -> bool:
        """Delete some rows of a table that belong to a resource; returns whether there may be more."""
        async with self._database.transaction(makes_room=True) as connection:
            return await _deleted_of(connection, owner, uid) == PURGE_BATCH


async def _deleted_of(connection: AsyncConnection, owner: Column[Any], uid: str) -> int:
    keys = list(owner.table.primary_key.columns)
    some = select(*keys).where(owner == uid).limit(PURGE_BATCH)
    return (await connection.execute(delete(owner.table).where(tuple_(*keys).in_(some)))).rowcount
