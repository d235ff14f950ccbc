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
from luthier.work.log import EventLog
from luthier.work.schema import deliveries, events, tasks

PURGE_BATCH = 500
"""Rows that one transaction deletes at most."""
RESOURCES_AT_ONCE = 20
"""Resources that are purged together: some tens of milliseconds for the longest of their transactions."""
_FAILED_AT_MOST = 100
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
        log: EventLog,
        families: Sequence[Purged],
        metrics: PurgeMetrics,
        keep_seconds: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Args: whose resources, and their log; what has no time of its own goes `keep_seconds` after its deletion."""
        self._database = database
        self._log = log
        self._families = families
        self._metrics = metrics
        self._keep_seconds = keep_seconds
        self._clock = clock
        self._holds = Holds()

    async def sweep(self) -> None:
        """Purge what is due. Where one cannot be purged, the others are all the same; the next sweep tries again."""
        for family in self._families:
            failed: set[str] = set()
            # Some that cannot be purged keep no others; so many are another trouble.
            while len(failed) < _FAILED_AT_MOST and (uids := await self._due(family, failed)):
                failed |= await self._failed(family, uids)

    async def _failed(self, family: Purged, uids: Sequence[str]) -> set[str]:
        """Purge some resources together, or each alone where that fails; return those with which it went wrong."""
        try:
            await self._purge(family, uids)
            return set()
        except Exception:  # whatever it is, one of these resources may be without it
            if len(uids) == 1:
                _logger.exception("%s %s cannot be purged", family.rows.table.name, uids[0])
                return set(uids)
            _logger.warning(
                "%d of %s cannot be purged together, each is tried alone",
                len(uids),
                family.rows.table.name,
                exc_info=True,
            )
        return {one for uid in uids for one in await self._failed(family, [uid])}

    async def _due(self, family: Purged, without: Collection[str]) -> Sequence[str]:
        is_other = family.rows.table.c.uid.not_in(without)
        statement = self._due_statement(family).where(is_other).limit(RESOURCES_AT_ONCE)
        return [row["uid"] for row in await self._database.rows(statement)]

    def _due_statement(self, family: Purged) -> Select[Any]:
        columns, now_us = family.rows.table.c, round(self._clock() * 1e6)
        # What cannot come back has no time of its own: it goes with the others, for its etags count on until then.
        former = and_(
            columns.purge_time_us.is_(None),
            columns.delete_time_us <= now_us - round(self._keep_seconds * 1e6),
        )
        is_due = and_(columns.delete_time_us.is_not(None), or_(columns.purge_time_us <= now_us, former))
        return select(columns.uid).where(is_due, ~self._holds.keep(columns.uid))

    async def _purge(self, family: Purged, uids: Sequence[str]) -> None:
        """Purge some resources: a transaction for a step with all of them, as each costs more than what it deletes."""
        rows = family.rows
        async with self._database.transaction(makes_room=True) as connection:
            # Less what was brought back meanwhile, or is needed by what was.
            still = self._due_statement(family).where(rows.table.c.uid.in_(uids))
            due = (await connection.execute(still)).scalars().all()
            await DeletedRows(rows).give_up(connection, *due)
        if not due:
            return
        with self._log.purging(due):
            await self._delete(family, due)
        for uid in due:
            self._metrics.purged(rows.table.name)
            _logger.info("purged", extra={"family": rows.table.name, "uid": uid})

    async def _delete(self, family: Purged, due: Sequence[str]) -> None:
        # What they refer to before the rows that say so: whoever looks in between finds no row that nothing explains.
        while await self._let_some_go(due):
            pass
        for owner in (*family.parts, events.c.uid, deliveries.c.uid):
            while await self._delete_some(owner, due):
                pass
        deleted = DeletedRows(family.rows)
        async with self._database.transaction(makes_room=True) as connection:
            await _delete_tasks(connection, due)
            await self._holds.drop(connection, *due)
            for uid in due:
                await deleted.purge(connection, uid)

    async def _let_some_go(self, uids: Sequence[str]) -> bool:
        """Let go some of the blobs that resources and their parts refer to; returns whether there may be more."""
        left = PURGE_BATCH
        async with self._database.transaction(makes_room=True) as connection:
            for uid in uids:
                left -= await blob_refs.drop_whole(connection, uid, left)
                if left == 0:
                    return True
        return False

    async def _delete_some(self, owner: Column[Any], uids: Sequence[str]) -> bool:
        """Delete some rows of a table that belong to resources; returns whether there may be more."""
        async with self._database.transaction(makes_room=True) as connection:
            return await _deleted_of(connection, owner, uids) == PURGE_BATCH


async def _delete_tasks(connection: AsyncConnection, uids: Sequence[str]) -> None:
    """Delete the tasks of resources, and what the worker of one that is not over was promised to find."""
    gone = delete(tasks).where(tasks.c.uid.in_(uids)).returning(tasks.c.task_id)
    ids = (await connection.execute(gone)).scalars().all()
    await blob_refs.drop(connection, *(blob_refs.task_owner(one) for one in ids))


async def _deleted_of(connection: AsyncConnection, owner: Column[Any], uids: Sequence[str]) -> int:
    keys = list(owner.table.primary_key.columns)
    some = select(*keys).where(owner.in_(uids)).limit(PURGE_BATCH)
    return (await connection.execute(delete(owner.table).where(tuple_(*keys).in_(some)))).rowcount
