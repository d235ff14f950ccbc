"""Who needs a resource: rows that keep it from being deleted, written in the transaction that makes the need."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from sqlalchemy import Column, ColumnElement, delete, exists, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from luthier.errors import FailedPrecondition, Reason
from luthier.storage import dialect
from luthier.storage.stored import Stored
from luthier.work.schema import holds

GRACE_SECONDS = 3600.0
"""A hold lasts at least so long after its keeper was away; those who need it prolong it sooner."""
_NAMED = 3


def _now_us() -> int:
    return time.time_ns() // 1000


class Holds:
    """The holds on resources of one service. Every method runs in the caller's transaction.

    A resource of the same service holds by its uid: until it has ended, or as long as it is there when its hold is
    `lasting`. One of another service holds by an id of its own choice, for a time that it sets anew and again.
    What is deleted and not purged holds on: it keeps what it needs from being purged, and not from being deleted.
    """

    def __init__(self, clock_us: Callable[[], int] = _now_us) -> None:
        self._clock_us = clock_us

    async def add(
        self,
        connection: AsyncConnection,
        held: Iterable[str],
        holder: Stored[Any, Any],
        *,
        lasting: bool = False,
    ) -> None:
        """Have a resource hold others, by their uids."""
        rows = [
            {"held": uid, "hold": holder.uid, "holder": holder.message.name, "lasting": lasting}
            for uid in dict.fromkeys(held)
        ]
        if rows:
            statement = dialect.insert(holds)
            either = or_(holds.c.lasting, statement.excluded.lasting)
            statement = statement.on_conflict_do_update(
                index_elements=["held", "hold"], set_={"lasting": either}
            )
            await connection.execute(statement, rows)

    async def set(
        self, connection: AsyncConnection, held: str, hold: str, holder: str, seconds: float
    ) -> None:
        """Hold the resource of a uid for another service, so long from now; the same hold again holds it longer."""
        expire_time_us = self._clock_us() + round(seconds * 1e6)
        row = {"held": held, "hold": hold, "holder": holder, "lasting": True}
        statement = dialect.insert(holds).values(**row, expire_time_us=expire_time_us)
        await connection.execute(
            statement.on_conflict_do_update(
                index_elements=["held", "hold"], set_={"expire_time_us": expire_time_us}
            )
        )

    async def end(self, connection: AsyncConnection, hold: str) -> None:
        """Let go what a resource held until it ended."""
        await connection.execute(delete(holds).where(holds.c.hold == hold, holds.c.lasting.is_(False)))

    def keep(self, column: Column[Any]) -> ColumnElement[bool]:
        """Return what says that something holds the resource whose uid is in a column."""
        return exists().where(holds.c.held == column, self._lives())

    async def rest(self, connection: AsyncConnection, uid: str) -> None:
        """Note that the resource of a uid is deleted, as a holder and as what is held."""
        await self._mark(connection, uid, deleted=True)

    async def wake(self, connection: AsyncConnection, uid: str) -> None:
        """Note that a deleted resource is back."""
        await self._mark(connection, uid, deleted=False)

    async def _mark(self, connection: AsyncConnection, uid: str, *, deleted: bool) -> None:
        for column, mark in ((holds.c.hold, holds.c.holder_deleted), (holds.c.held, holds.c.held_deleted)):
            await connection.execute(update(holds).where(column == uid).values({mark.name: deleted}))

    async def missing(self, connection: AsyncConnection, hold: str) -> Sequence[str]:
        """Return the uids of what a resource needs and is deleted."""
        statement = select(holds.c.held).where(holds.c.hold == hold, holds.c.held_deleted)
        return (await connection.execute(statement)).scalars().all()

    async def drop(self, connection: AsyncConnection, *uids: str) -> None:
        """Let go all that the resources of these uids held."""
        await connection.execute(delete(holds).where(holds.c.hold.in_(uids)))

    async def release(self, connection: AsyncConnection, hold: str) -> None:
        """Let go what another service held under this id."""
        of_others = holds.c.expire_time_us.is_not(None)
        await connection.execute(delete(holds).where(holds.c.hold == hold, of_others))

    async def excuse(self, connection: AsyncConnection) -> None:
        """Give every hold of another service some time: while this one was away, nobody could prolong it."""
        least_us = self._clock_us() + round(GRACE_SECONDS * 1e6)
        late = holds.c.expire_time_us < least_us
        await connection.execute(update(holds).where(late).values(expire_time_us=least_us))

    async def held(self, connection: AsyncConnection, uids: Sequence[str]) -> frozenset[str]:
        """Return those of some uids that are held."""
        statement = select(holds.c.held).where(holds.c.held.in_(uids), self._lives())
        return frozenset((await connection.execute(statement)).scalars())

    async def require_free(
        self,
        connection: AsyncConnection,
        stored: Stored[Any, Any],
        parts: Sequence[str] = (),
        *,
        for_good: bool = False,
    ) -> None:
        """Raise FailedPrecondition RESOURCE_IN_USE, with who needs it, while a resource or one of its parts is held.

        `parts` are uids of what goes with it. `for_good`: what is deleted and may come back counts as well.
        """
        mine = [holds.c.held.in_((stored.uid, *parts)), self._lives()]
        if not for_good:
            mine.append(holds.c.holder_deleted.is_(False))
        statement = select(holds.c.holder).where(*mine).order_by(holds.c.holder).distinct()
        holders = list((await connection.execute(statement)).scalars())
        if not holders:
            return
        name = stored.message.name
        more = f" and {len(holders) - _NAMED} more" if len(holders) > _NAMED else ""
        raise FailedPrecondition(
            f"{name} is needed by {', '.join(holders[:_NAMED])}{more}, until they "
            f"{'are purged' if for_good else 'have ended or are deleted'}",
            reason=Reason.RESOURCE_IN_USE,
            metadata={"name": name, "holder": holders[0], "holders": str(len(holders))},
        )

    def _lives(self) -> ColumnElement[bool]:
        return or_(holds.c.expire_time_us.is_(None), holds.c.expire_time_us > self._clock_us())

    async def forget_expired(self, connection: AsyncConnection) -> None:
        """Delete holds whose time is over."""
        await connection.execute(delete(holds).where(holds.c.expire_time_us <= self._clock_us()))
