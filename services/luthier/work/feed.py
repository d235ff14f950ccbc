"""Events on their way to watchers: read once for all who stand at the same place, and sent as they are stored."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

CHUNK = 256
MAX_CHUNKS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """An event as it goes over the wire, which is as it is stored; after a `final` one none follows."""

    sequence: int
    final: bool
    wire: bytes


Load = Callable[[str, int, int], Awaitable[Sequence[Told]]]
"""Reads at most so many events (third) of a resource (uid, first) from a number (second) on, in order."""


@dataclass(slots=True)
class _Chunk:
    """Events that follow one another without a gap; `version` of the resource when they were last read."""

    version: int = -1
    events: list[Told] = field(default_factory=list)
    reading: asyncio.Lock = field(default_factory=asyncio.Lock)


class Feed:
    """The latest chunks of watched resources: `MAX_CHUNKS` of `CHUNK` events at most, whoever reads how slowly.

    A log grows at its end alone, so a full chunk is true for ever, and the last one until its resource is `touch`ed. Of
    what was told long ago the beginning may be gone, but not while it is watched (`EventLog.unwatched`). What was let
    go from here is read again by whom it is late for.
    """

    def __init__(self, load: Load) -> None:
        self._load = load
        self._versions: dict[str, int] = {}
        self._chunks: OrderedDict[tuple[str, int], _Chunk] = OrderedDict()

    def touch(self, uid: str) -> None:
        """Say that a resource has more events now."""
        self._versions[uid] = self.version(uid) + 1

    def version(self, uid: str) -> int:
        """Return how often a resource was touched since somebody watches it."""
        return self._versions.get(uid, 0)

    def forget(self, uid: str) -> None:
        """Let go of a resource that nobody watches any more."""
        self._versions.pop(uid, None)
        for key in [key for key in self._chunks if key[0] == uid]:
            del self._chunks[key]

    async def events(self, uid: str, first: int) -> Sequence[Told]:
        """Return events from number `first` on, at most a chunk; none when it is not there yet.

        Those who ask at once for the same ones wait for one reading. Raises what the reading raises.
        """
        index = (first - 1) // CHUNK
        key = (uid, index)
        chunk = self._chunks.get(key)
        if chunk is None:
            chunk = self._chunks[key] = _Chunk()
            self._shrink(key)
        self._chunks.move_to_end(key)
        if not self._is_current(uid, index, chunk):
            async with chunk.reading:
                await self._read(uid, index, chunk)
        return chunk.events[max(0, first - chunk.events[0].sequence) :] if chunk.events else []

    async def refresh(self, uid: str) -> None:
        """Read what is new of a resource before its watchers come to ask. Raises what the reading raises."""
        newest = max((index for known, index in self._chunks if known == uid), default=None)
        if newest is None:
            return
        found = await self.events(uid, newest * CHUNK + 1)
        # Its last watcher may have left while it was read: a chunk that is made then would never be let go.
        is_known = (uid, newest) in self._chunks
        if is_known and found and found[-1].sequence == (newest + 1) * CHUNK:
            await self.events(uid, (newest + 1) * CHUNK + 1)

    def _is_current(self, uid: str, index: int, chunk: _Chunk) -> bool:
        return _last(index, chunk) == (index + 1) * CHUNK or chunk.version == self.version(uid)

    async def _read(self, uid: str, index: int, chunk: _Chunk) -> None:
        if self._is_current(uid, index, chunk):
            return
        # What is committed while we read counts as not read: it is read again, never missed.
        version = self.version(uid)
        last, end = _last(index, chunk), (index + 1) * CHUNK
        # Where its beginning is gone, as many lie beyond its end.
        chunk.events += [one for one in await self._load(uid, last + 1, end - last) if one.sequence <= end]
        chunk.version = version

    def _shrink(self, kept: tuple[str, int]) -> None:
        while len(self._chunks) > MAX_CHUNKS:
            oldest = next(key for key in self._chunks if key != kept)
            del self._chunks[oldest]


def _last(index: int, chunk: _Chunk) -> int:
    """Return the number of the last event of a chunk, or of the one before it."""
    return chunk.events[-1].sequence if chunk.events else index * CHUNK
