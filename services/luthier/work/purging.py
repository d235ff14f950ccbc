"""Purging what was deleted long ago, or was given up: a batch a transaction, so that others write in between."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry
from sqlalchemy import Column, Select, and_, delete, or_, select, tuple_
from sqlalchemy.ext.asyncio import AsyncConnection

from luthier.runtime.catalogue import stores
from luthier.storage import blob_refs
from luthier.storage.database import Database
from luthier.storage.deleted import DeletedRows
from luthier.storage.stored import Rows
from luthier.work.holds import Holds
from luthier.work.schema import deliveries, events, tasks
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


class PurgeMetrics:
    """How much is purged."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._purged = stores.PURGED.counter(registry)

    def purged(self, table: str) -> None:
        """Count a resource of a table that is gone for good."""
        self._purged.labels(table).inc()


class Purging:
    """Deletes all that there is of what was deleted for long enough and is needed by nothing that may come back."""

    def __init__(
        self,
        database: Database,
        families: Sequence[Purged],
        metrics: PurgeMetrics,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._database = database
        self._families = families
        self._metrics = metrics
        self._clock = clock
        self._holds = Holds()

    async def sweep(self) -> None:
        """Purge what is due. Where one cannot be purged, the others are all the same; the next sweep tries again."""
        for family in self._families:
            failed: set[str] = set()
            # Some that cannot be purged keep no others; so many are another trouble.
            while len(failed) < _RESOURCES_AT_ONCE and (uids := await self._due(family, failed)):
                failed |= {uid for uid in uids if not await self._is_purged(family, uid)}

    async def _is_purged(self, family: Purged, uid: str) -> bool:
        """Purge a resource; return whether nothing went wrong."""
        try:
            await self._purge(family, uid)
        except Exception:  # whatever it is: it is of this resource
            _logger.exception("%s %s cannot be purged", family.rows.table.name, uid)
            return False
        return True

    async def _due(self, family: Purged, without: Collection[str]) -> Sequence[str]:
        is_other = family.rows.table.c.uid.not_in(without)
        statement = self._due_statement(family).where(is_other).limit(_RESOURCES_AT_ONCE)
        return [row["uid"] for row in await self._database.rows(statement)]

    def _due_statement(self, family: Purged) -> Select[Any]:
        columns, now_us = family.rows.table.c, round(self._clock() * 1e6)
        # What cannot come back has no time of its own: it goes with the others, for its etags count on until then.
        former = and_(
            columns.purge_time_us.is_(None), columns.delete_time_us <= now_us - round(KEEP_SECONDS * 1e6)
        )
        is_due = and_(columns.delete_time_us.is_not(None), or_(columns.purge_time_us <= now_us, former))
        return select(columns.uid).where(is_due, ~self._holds.keep(columns.uid))

    async def _purge(self, family: Purged, uid: str) -> None:
        deleted = DeletedRows(family.rows)
        async with self._database.transaction(makes_room=True) as connection:
            still = self._due_statement(family).where(family.rows.table.c.uid == uid)
            if (await connection.execute(still)).first() is None:
                return  # it was brought back, or something that needs it was
            await deleted.give_up(connection, uid)
        # What it refers to before the rows that say so: whoever looks in between finds no row that nothing explains.
        while await self._let_some_go(uid):
            pass
        for owner in (*family.parts, events.c.uid):
            while await self._delete_some(owner, uid):
                pass
        async with self._database.transaction(makes_room=True) as connection:
            await _delete_tasks(connection, uid)
            await connection.execute(delete(deliveries).where(deliveries.c.uid == uid))
            await self._holds.drop(connection, uid)
            await deleted.purge(connection, uid)
        self._metrics.purged(family.rows.table.name)
        _logger.info("purged", extra={"family": family.rows.table.name, "uid": uid})

    async def _let_some_go(self, uid: str) -> bool:
        """Let go some of the blobs that a resource and its parts refer to; returns whether there may be more."""
        async with self._database.transaction(makes_room=True) as connection:
            return await blob_refs.drop_whole(connection, uid, PURGE_BATCH) == PURGE_BATCH

    async def _delete_some(self, owner: Column[Any], uid: str) -> bool:
        """Delete some rows of a table that belong to a resource; returns whether there may be more."""
        async with self._database.transaction(makes_room=True) as connection:
            return await _deleted_of(connection, owner, uid) == PURGE_BATCH


async def _delete_tasks(connection: AsyncConnection, uid: str) -> None:
    """Delete the tasks of a resource, and what the worker of one that is not over was promised to find."""
    gone = delete(tasks).where(tasks.c.uid == uid).returning(tasks.c.task_id)
    ids = (await connection.execute(gone)).scalars().all()
    await blob_refs.drop(connection, *(blob_refs.task_owner(one) for one in ids))


async def _deleted_of(connection: AsyncConnection, owner: Column[Any], uid: str) -> int:
    keys = list(owner.table.primary_key.columns)
    some = select(*keys).where(owner == uid).limit(PURGE_BATCH)
    return (await connection.execute(delete(owner.table).where(tuple_(*keys).in_(some)))).rowcount
