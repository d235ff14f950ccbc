"""The event log: numbered events, appended in the transaction that makes them true, followed live."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from sqlalchemy import func, insert, select
from sqlalchemy.ext.asyncio import AsyncConnection

from luthier.errors import NotFound, OutOfRange, Reason, ResourceExhausted
from luthier.storage.database import Database
from luthier.v1.event_pb2 import Event
from luthier.work.feed import Feed, Told
from luthier.work.schema import events

HEARTBEAT_SECONDS = 10.0
SLOW_READER_SECONDS = 60.0
# Watchers are woken at once by the first of many commits, and by the others together.
_PAUSE_SECONDS = 0.05
_WOKEN_TOGETHER = 32
_ENDED_LONG_AGO = "of what ended long ago the last event alone is kept"
_Require = Callable[[AsyncConnection], Awaitable[object]]
_logger = logging.getLogger(__name__)


class EventLog:
    """Numbered events by the uid of their resource, in SQL; live watchers wake after each commit.

    Watchers pull at their own pace from a feed that reads the database once for all of them, so that many cost
    little more than one, and a slow one no memory.
    """

    def __init__(
        self,
        database: Database,
        *,
        heartbeat_seconds: float = HEARTBEAT_SECONDS,
        slow_reader_seconds: float = SLOW_READER_SECONDS,
    ) -> None:
        self._database = database
        self._heartbeat_seconds = heartbeat_seconds
        self._slow_reader_seconds = slow_reader_seconds
        self._watchers: defaultdict[str, set[asyncio.Event]] = defaultdict(set)
        self._waking: dict[str, asyncio.Task[None]] = {}
        self._trimming: dict[str, asyncio.Event] = {}
        self._purging: set[str] = set()
        self._purged: set[str] = set()
        self._feed = Feed(self._load)

    async def append(
        self, connection: AsyncConnection, uid: str, new: Sequence[Event], *, final: bool = False
    ) -> None:
        """Number and store events in the caller's transaction; watchers see them after its commit.

        After a `final` last one no event follows. What is given is left as it is.
        """
        if not new:
            return
        last = await self._last_sequence(connection, uid)
        now_us = time.time_ns() // 1000
        rows = []
        for sequence, told in enumerate(new, start=last + 1):
            event = Event()
            event.CopyFrom(told)
            event.sequence = sequence
            event.event_time.FromMicroseconds(now_us)
            is_final = final and sequence == last + len(new)
            rows.append(
                {
                    "uid": uid,
                    "sequence": sequence,
                    "final": is_final,
                    "event": event.SerializeToString(),
                    "ended_at_us": now_us if is_final else None,
                }
            )
        await connection.execute(insert(events), rows)
        self._database.after_commit(lambda: self._wake(uid))

    async def read(
        self, connection: AsyncConnection, uid: str, start_sequence: int, limit: int
    ) -> list[Event]:
        """Return at most `limit` events of a resource from `start_sequence` on, in order."""
        return [
            Event.FromString(told.wire) for told in await self._told(connection, uid, start_sequence, limit)
        ]

    async def newest(self, connection: AsyncConnection, uid: str, limit: int) -> list[Event]:
        """Return the last events of a resource, at most `limit`, in order."""
        first = await self._last_sequence(connection, uid) - limit + 1
        return await self.read(connection, uid, first, limit)

    async def first_of(self, connection: AsyncConnection, uid: str, attempt: int) -> int:
        """Return the number from which on the events of a resource are of an attempt, or of none, and none before is.

        Of work that is not dealt: there attempts follow one another, so that halving finds it in a log of any length.
        """
        first = 1
        end = behind = await self._last_sequence(connection, uid) + 1
        while first < behind:
            middle = (first + behind) // 2
            event = await self._next_of_any(connection, uid, middle, end)
            if event is not None and event.attempt < attempt:
                first = event.sequence + 1
            else:
                behind = middle
        return first

    async def _next_of_any(self, connection: AsyncConnection, uid: str, first: int, end: int) -> Event | None:
        """Return the next event that is of an attempt, from one number up to another; None: all are of none."""
        for sequence in range(first, end):
            (event,) = await self.read(connection, uid, sequence, 1)
            if event.attempt:
                return event
        return None

    async def _told(self, connection: AsyncConnection, uid: str, first: int, limit: int) -> list[Told]:
        statement = (
            select(events)
            .where(events.c.uid == uid, events.c.sequence >= first)
            .order_by(events.c.sequence)
            .limit(limit)
        )
        return [
            Told(sequence=row.sequence, final=row.final, wire=row.event)
            for row in await connection.execute(statement)
        ]

    async def watch(
        self, uid: str, name: str, start_sequence: int = 0, require: _Require | None = None
    ) -> AsyncGenerator[bytes, None]:
        """Yield the events of a resource from `start_sequence` (0: the first there is) on, with heartbeats while quiet.

        As the bytes of each, which are made once, when it is stored, and shared by all who watch.

        Ends after a final state change; at once when that one is already read. `require` raises where the resource is
        not there; asked where nothing is told of it, as it may be purged since it was found.

        Raises:
            OutOfRange: start_sequence is below 0 or beyond the next event, or that event is gone.
            NotFound: the resource is purged before its last event was read.
            ResourceExhausted: the reader took too long to accept an event; it can resume after it.
        """
        woken = asyncio.Event()
        self._watchers[uid].add(woken)
        try:
            # None is let go from here on, as it is watched.
            while (trimming := self._trimming.get(uid)) is not None:
                await trimming.wait()
            wanted = await self._place(uid, name, start_sequence, require)
            if wanted is None:
                return
            async for wire in self._follow(uid, name, wanted, woken):
                yield wire
        finally:
            self._watchers[uid].discard(woken)
            if not self._watchers[uid]:
                del self._watchers[uid]
                self._purged.discard(uid)
                self._feed.forget(uid)

    async def _place(self, uid: str, name: str, start_sequence: int, require: _Require | None) -> int | None:
        """Return the number of the first event that a watcher wants; None when the final one is read already."""
        async with self._database.reading() as connection:
            first = await self._end_of(connection, func.min, uid) or 1
            last = await self._last_sequence(connection, uid)
            newest = select(events.c.final).where(events.c.uid == uid, events.c.sequence == last)
            has_ended = (await connection.execute(newest)).scalar()
            if require is not None and last == 0:
                await require(connection)
        wanted = start_sequence or first
        if self._is_purged(uid):
            raise _purged(name, wanted)
        if wanted > last + 1:
            raise OutOfRange(
                reason=Reason.SEQUENCE_EXPIRED,
                message=f"start_sequence must be at most {last + 1}, the next of {name}, got {wanted}",
                metadata={"start_sequence": str(wanted), "next_sequence": str(last + 1)},
            )
        if wanted < first:
            raise _expired(name, wanted, first)
        return None if wanted > last and has_ended else wanted

    @contextmanager
    def unwatched(self, uid: str) -> Iterator[bool]:
        """Have who begins to watch a resource wait for a block; yields False, and none waits, where one watches it."""
        if uid in self._watchers:
            yield False
            return
        done = self._trimming[uid] = asyncio.Event()
        try:
            yield True
        finally:
            del self._trimming[uid]
            done.set()

    @contextmanager
    def purging(self, uids: Collection[str]) -> Iterator[None]:
        """Have who watches resources, or begins to, told that they are gone: in the block, in which their events go."""
        self._purging.update(uids)
        for uid in uids:
            self._wake(uid)
        try:
            yield
        finally:
            self._purging.difference_update(uids)
            self._purged.update(uid for uid in uids if uid in self._watchers)

    def _is_purged(self, uid: str) -> bool:
        return uid in self._purging or uid in self._purged

    async def _follow(
        self, uid: str, name: str, wanted: int, woken: asyncio.Event
    ) -> AsyncGenerator[bytes, None]:
        while True:
            woken.clear()
            batch = await self._feed.events(uid, wanted)
            # After it was read: what was said before that went may be whole no longer.
            if self._is_purged(uid):
                raise _purged(name, wanted)
            for event in batch:
                assert event.sequence == wanted, f"{name}: event {event.sequence} follows {wanted - 1}"
                sent_at = time.monotonic()
                yield event.wire
                self._refuse_slow_reader(name, event.sequence, time.monotonic() - sent_at)
                wanted = event.sequence + 1
                if event.final:
                    return
            if batch:
                continue
            try:
                async with asyncio.timeout(self._heartbeat_seconds):
                    await woken.wait()
            except TimeoutError:
                heartbeat = Event(sequence=wanted - 1)
                heartbeat.heartbeat.SetInParent()
                yield heartbeat.SerializeToString()

    def _refuse_slow_reader(self, name: str, sequence: int, seconds: float) -> None:
        if seconds > self._slow_reader_seconds:
            raise ResourceExhausted(
                reason=Reason.SLOW_READER,
                message=(
                    f"reading one event of {name} took {seconds:.0f} s, the limit is "
                    f"{self._slow_reader_seconds:.0f} s; watch again from sequence {sequence + 1}"
                ),
                metadata={"next_sequence": str(sequence + 1)},
            )

    async def _last_sequence(self, connection: AsyncConnection, uid: str) -> int:
        return await self._end_of(connection, func.max, uid)

    async def _end_of(self, connection: AsyncConnection, end: Callable[[Any], Any], uid: str) -> int:
        """Return the least or the greatest number of a resource's events, 0 where it has none."""
        return (
            await connection.execute(select(end(events.c.sequence)).where(events.c.uid == uid))
        ).scalar() or 0

    async def _load(self, uid: str, first: int, limit: int) -> list[Told]:
        async with self._database.reading() as connection:
            return await self._told(connection, uid, first, limit)

    def _wake(self, uid: str) -> None:
        if uid not in self._watchers:
            return
        self._feed.touch(uid)
        if uid not in self._waking:
            self._waking[uid] = asyncio.get_running_loop().create_task(self._wake_all(uid))

    async def _wake_all(self, uid: str) -> None:
        """Wake every watcher, a few at a time so that other calls come in between, until none has missed a commit."""
        version = -1
        try:
            while version != self._feed.version(uid):
                version = self._feed.version(uid)
                await self._feed.refresh(uid)
                await self._wake_some(tuple(self._watchers.get(uid, ())))
                await asyncio.sleep(_PAUSE_SECONDS)
        except Exception:  # watchers read for themselves, and say what is wrong
            _logger.exception("cannot read the events of %s", uid)
            await self._wake_some(tuple(self._watchers.get(uid, ())))
        finally:
            # Before anything else runs: a commit from now on starts a task of its own.
            del self._waking[uid]

    async def _wake_some(self, watchers: Sequence[asyncio.Event]) -> None:
        for place, woken in enumerate(watchers, start=1):
            woken.set()
            if place % _WOKEN_TOGETHER == 0:
                await asyncio.sleep(0)


def page_expired(uid: str, after: int, first: int) -> OutOfRange:
    """Return what tells who pages through events that the next page's are gone, and how to get those that are left."""
    return OutOfRange(
        reason=Reason.SEQUENCE_EXPIRED,
        message=(
            f"the events after {after} of the resource with uid {uid} are gone: {_ENDED_LONG_AGO}; list them anew "
            f"without a page_token: those that are left begin with event {first}"
        ),
        metadata={"first_sequence": str(first)},
    )


def _expired(name: str, wanted: int, first: int) -> OutOfRange:
    return OutOfRange(
        reason=Reason.SEQUENCE_EXPIRED,
        message=(
            f"event {wanted} of {name} is gone: {_ENDED_LONG_AGO}; begin at {first}, "
            "or at 0 for the first that there is"
        ),
        metadata={"start_sequence": str(wanted), "first_sequence": str(first)},
    )


def _purged(name: str, wanted: int) -> NotFound:
    return NotFound(
        f"{name} was purged while it was watched: its events from {wanted} on are gone with it",
        metadata={"name": name, "next_sequence": str(wanted)},
    )
