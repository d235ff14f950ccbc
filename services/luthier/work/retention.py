"""Letting go of what ended resources told long ago: all but their last event, a batch a transaction."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence

from sqlalchemy import delete, func, select, update

from luthier.storage.database import Database
from luthier.work.log import EventLog
from luthier.work.schema import events

TRIM_BATCH = 500
"""Events that one transaction deletes at most."""
_RESOURCES_AT_ONCE = 100


class EventRetention:
    """Trims the logs of resources that ended long ago.

    The last event stays: it tells how the resource ended, and numbers are never given twice.
    """

    def __init__(
        self,
        database: Database,
        log: EventLog,
        keep_seconds: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Args: whose events; `keep_seconds` after its end a resource's go, 0: never."""
        self._database = database
        self._log = log
        self._keep_seconds = keep_seconds
        self._clock = clock

    async def trim(self) -> None:
        """Trim what is due. What is being watched is left for the next time."""
        if self._keep_seconds == 0:
            return
        watched: set[str] = set()
        while len(watched) < _RESOURCES_AT_ONCE and (due := await self._due(watched)):
            watched |= {uid for uid, last in due if not await self._is_trimmed(uid, last)}

    async def _due(self, without: Collection[str]) -> Sequence[tuple[str, int]]:
        """Return some resources whose time is over, each with the number of its last event."""
        before_us = round((self._clock() - self._keep_seconds) * 1e6)
        statement = (
            select(events.c.uid, events.c.sequence)
            .where(events.c.ended_at_us <= before_us, events.c.uid.not_in(without))
            .order_by(events.c.ended_at_us)
            .limit(_RESOURCES_AT_ONCE)
        )
        return [(row["uid"], row["sequence"]) for row in await self._database.rows(statement)]

    async def _is_trimmed(self, uid: str, last: int) -> bool:
        """Trim a log; return whether all went that is to go. Who comes to watch it waits for one batch, and ends it."""
        while True:
            with self._log.unwatched(uid) as is_unwatched:
                if not is_unwatched:
                    return False
                if not await self._trim_some(uid, last):
                    return True

    async def _trim_some(self, uid: str, last: int) -> bool:
        """Delete some events before a resource's last one, the oldest first, so that what is left has no gap.

        Returns whether there may be more; where there were none its end is not due again.
        """
        mine = events.c.uid == uid
        async with self._database.transaction(makes_room=True) as connection:
            first = (await connection.execute(select(func.min(events.c.sequence)).where(mine))).scalar_one()
            if first is None or first >= last:
                is_last = (mine, events.c.sequence == last)
                await connection.execute(update(events).where(*is_last).values(ended_at_us=None))
                return False
            edge = min(first + TRIM_BATCH, last)
            await connection.execute(delete(events).where(mine, events.c.sequence < edge))
            return True
