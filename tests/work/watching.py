"""What watchers get, as messages."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from luthier.v1.event_pb2 import Event


async def messages(watching: AsyncGenerator[bytes, None]) -> AsyncGenerator[Event, None]:
    """Yield the events whose bytes somebody watches."""
    async with aclosing(watching):
        async for wire in watching:
            yield Event.FromString(wire)
