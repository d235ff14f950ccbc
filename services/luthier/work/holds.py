"""Who needs a resource: rows that keep it from being deleted, written in the transaction that makes the need."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from sqlalchemy import delete, or_, select
from sqlalchemy.dialects import sqlite
from sqlalchemy.ext.asyncio import AsyncConnection

from luthier.errors import FailedPrecondition, Reason
from luthier.storage.stored import Stored
from luthier.work.schema import holds

_NAMED = 3


def _now_us() -> int:
    return time.time_ns() // 1000


class Holds:
    """The holds on resources of one service. Every method runs in the caller's transaction.

    A resource of the same service holds by its uid: until it has ended, or as long as it is there when its hold is
    `lasting`. One of another service holds by an id of its own choice, for a time that it sets anew and again.
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
            await connection.execute(sqlite.insert(holds).on_conflict_do_nothing(), rows)

    async def set(
        self, connection: AsyncConnection, held: str, hold: str, holder: str, expire_time_us: int
    ) -> None:
        """Hold the resource of a uid for another service until a time; the same hold again sets a new one."""
        row = {"held": held, "hold": hold, "holder": holder, "lasting": True}
        statement = sqlite.insert(holds).values(**row, expire_time_us=expire_time_us)
        await connection.execute(
            statement.on_conflict_do_update(
                index_elements=["held", "hold"], set_={"expire_time_us": expire_time_us}
            )
        )

    async def end(self, connection: AsyncConnection, hold: str) -> None:
        """Let go what a resource held until it ended."""
        await connection.execute(delete(holds).where(holds.c.hold == hold, holds.c.lasting.is_(False)))

    async def drop(self, connection: AsyncConnection, hold: str) -> None:
        """Let go all that a hold of this id, or the resource of this uid, held."""
        await connection.execute(delete(holds).where(holds.c.hold == hold))

    async def require_free(self, connection: AsyncConnection, stored: Stored[Any, Any]) -> None:
        """Raise FailedPrecondition RESOURCE_IN_USE, with who needs it, while a resource is held."""
        lives = or_(holds.c.expire_time_us.is_(None), holds.c.expire_time_us > self._clock_us())
        statement = select(holds.c.holder).where(holds.c.held == stored.uid, lives).order_by(holds.c.holder)
        holders = list((await connection.execute(statement)).scalars())
        if not holders:
            return
        name = stored.message.name
        more = f" and {len(holders) - _NAMED} more" if len(holders) > _NAMED else ""
        raise FailedPrecondition(
            f"{name} is needed by {', '.join(holders[:_NAMED])}{more}; delete or cancel them first",
            reason=Reason.RESOURCE_IN_USE,
            metadata={"name": name, "holder": holders[0], "holders": str(len(holders))},
        )

    async def forget_expired(self, connection: AsyncConnection) -> None:
        """Delete holds whose time is over."""
        await connection.execute(delete(holds).where(holds.c.expire_time_us <= self._clock_us()))
