"""Ends of resources that cannot be stored: what is to be told of them is undone with them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest
from sqlalchemy import func, select

from luthier.v1.webhook_pb2 import WebhookDelivery
from luthier.work.families import Family
from luthier.work.schema import deliveries


class Unstored(Exception):
    """What fails a transaction after the end of a resource was written in it."""


async def check_end_is_one(
    family: Any, name: str, end: Callable[[], Awaitable[object]], state: int, monkeypatch: pytest.MonkeyPatch
) -> WebhookDelivery:
    """Fail the transaction that ends a resource with one webhook, then let it be; return what is told of it.

    What is written in any transaction but that one is either missing in it, or still there once it has failed.
    """
    before = await family.read(name)
    written: list[int] = []
    move = Family.move

    async def fail(self: Any, connection: Any, stored: Any, to: int, **more: Any) -> Any:
        moved = await move(self, connection, stored, to, **more)
        if stored.uid == before.uid and self.lifecycle.is_final(to):
            found = select(func.count()).where(deliveries.c.uid == before.uid)
            written.append((await connection.execute(found)).scalar_one())
            raise Unstored
        return moved

    with monkeypatch.context() as patch:
        patch.setattr(Family, "move", fail)
        with pytest.raises(Unstored):
            await end()
    assert written == [1], "it is written in the transaction of the end"
    assert (await family.read(name)).message.state == before.message.state
    assert await family.deliveries(before.uid, 0, 10) == []

    await end()
    assert (await family.read(name)).message.state == state
    found: Sequence[tuple[int, WebhookDelivery]] = await family.deliveries(before.uid, 0, 10)
    ((number, told),) = found
    assert (number, told.state) == (1, WebhookDelivery.STATE_PENDING)
    return told
