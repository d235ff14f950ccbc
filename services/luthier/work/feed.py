"""Events on their way to watchers: read and translated once for all who stand at the same place."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from luthier.v1 import event_pb2

CHUNK = 256
MAX_CHUNKS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """An event as watchers get it; after a `final` one none follows."""

    sequence: int
    final: bool
    message: event_pb2.Event


Load = Callable[[str, int, int], Awaitable[Sequence[Told]]]
"""Reads at most so many events (third) of a subject (first) from a number (second) on, in order."""


@dataclass(slots=True)
class _Chunk:
    """Events that follow one another without a gap; `version` of the subject when they were last read."""

    version: int = -1
    events: list[Told] = field(default_factory=list)
    reading: asyncio.Lock = field(default_factory=asyncio.Lock)


class Feed:
    """The latest chunks of watched subjects: `MAX_CHUNKS` of `CHUNK` events at most, whoever reads how slowly.

    A log only grows, so a full chunk is true for ever, and the last one until the subject is `touch`ed. What was
    let go is read again by whom it is late for. Messages are shared: who gets one must not change it.
    """

    def __init__(self, load: Load) -> None:
        self._load = load
        self._versions: dict[str, int] = {}
        self._chunks: OrderedDict[tuple[str, int], _Chunk] = OrderedDict()

    def touch(self, subject: str) -> None:
        """Say that a subject has more events now."""
        self._versions[subject] = self.version(subject) + 1

    def version(self, subject: str) -> int:
        """Return how often a subject was touched since somebody watches it."""
        return self._versions.get(subject, 0)

    def forget(self, subject: str) -> None:
        """Let go of a subject that nobody watches any more."""
        self._versions.pop(subject, None)
        for key in [key for key in self._chunks if key[0] == subject]:
            del self._chunks[key]

    async def events(self, subject: str, first: int) -> Sequence[Told]:
        """Return events from number `first` on, at most a chunk; none when it is not there yet.

        Those who ask at once for the same ones wait for one reading. Raises what the reading raises.
        """
        index, offset = divmod(first - 1, CHUNK)
        key = (subject, index)
        chunk = self._chunks.get(key)
        if chunk is None:
            chunk = self._chunks[key] = _Chunk()
            self._shrink(key)
        self._chunks.move_to_end(key)
        if not self._is_current(subject, chunk):
            async with chunk.reading:
                await self._read(subject, index, chunk)
        return chunk.events[offset:]

    async def refresh(self, subject: str) -> None:
        """Read what is new of a subject before its watchers come to ask. Raises what the reading raises."""
        newest = max((index for known, index in self._chunks if known == subject), default=None)
        if newest is not None and len(await self.events(subject, newest * CHUNK + 1)) == CHUNK:
            await self.events(subject, (newest + 1) * CHUNK + 1)

    def _is_current(self, subject: str, chunk: _Chunk) -> bool:
        return len(chunk.events) == CHUNK or chunk.version == self.version(subject)

    async def _read(self, subject: str, index: int, chunk: _Chunk) -> None:
        if self._is_current(subject, chunk):
            return
        # What is committed while we read counts as not read: it is read again, never missed.
        version = self.version(subject)
        have = len(chunk.events)
        chunk.events += await self._load(subject, index * CHUNK + have + 1, CHUNK - have)
        chunk.version = version

    def _shrink(self, kept: tuple[str, int]) -> None:
        while len(self._chunks) > MAX_CHUNKS:
            oldest = next(key for key in self._chunks if key != kept)
            del self._chunks[oldest]
