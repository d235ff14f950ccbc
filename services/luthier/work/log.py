"""The event log: numbered events, appended in the transaction that makes them true, followed live."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence

from sqlalchemy import func, insert, select
from sqlalchemy.ext.asyncio import AsyncConnection

from luthier.errors import OutOfRange, Reason, ResourceExhausted
from luthier.storage.database import Database
from luthier.v1 import event_pb2
from luthier.work.convert import event_to_proto, payload_to_row, row_to_payload, time_from_us
from luthier.work.events import Entry, Event, StateChanged
from luthier.work.feed import Feed, Told
from luthier.work.schema import events

HEARTBEAT_SECONDS = 10.0
SLOW_READER_SECONDS = 60.0
# Watchers are woken at once by the first of many commits, and by the others together.
_PAUSE_SECONDS = 0.05
_WOKEN_TOGETHER = 32
_logger = logging.getLogger(__name__)


class EventLog:
    """Numbered events by subject, in SQL; live watchers wake after each commit.

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
        self._feed = Feed(self._load)

    async def append(self, connection: AsyncConnection, subject: str, entries: Sequence[Entry]) -> None:
        """Number and store entries in the caller's transaction; watchers see them after its commit."""
        if not entries:
            return
        last = await self._last_sequence(connection, subject)
        now_us = time.time_ns() // 1000
        rows = []
        for offset, entry in enumerate(entries, start=1):
            kind, payload = payload_to_row(entry.payload)
            rows.append(
                {
                    "subject": subject,
                    "sequence": last + offset,
                    "event_time_us": now_us,
                    "attempt": entry.attempt,
                    "step": entry.step,
                    "kind": kind,
                    "payload": payload,
                }
            )
        await connection.execute(insert(events), rows)
        self._database.after_commit(lambda: self._wake(subject))

    async def read(
        self, connection: AsyncConnection, subject: str, start_sequence: int, limit: int
    ) -> list[Event]:
        """Return at most `limit` events from `start_sequence` on, in order."""
        statement = (
            select(events)
            .where(events.c.subject == subject, events.c.sequence >= start_sequence)
            .order_by(events.c.sequence)
            .limit(limit)
        )
        return [
            Event(
                sequence=row.sequence,
                event_time=time_from_us(row.event_time_us),
                entry=Entry(
                    payload=row_to_payload(row.kind, row.payload), step=row.step, attempt=row.attempt
                ),
            )
            for row in await connection.execute(statement)
        ]

    async def watch(self, subject: str, start_sequence: int = 0) -> AsyncIterator[event_pb2.Event]:
        """Yield the events of `subject` from `start_sequence` (0 means 1) on, with heartbeats while quiet.

        Ends after a final state change; at once when that one is already read.

        Raises:
            OutOfRange: start_sequence lies beyond the next event.
            ResourceExhausted: the reader took too long to accept an event; it can resume after it.
        """
        wanted = max(start_sequence, 1)
        async with self._database.reading() as connection:
            last = await self._last_sequence(connection, subject)
            newest = await self.read(connection, subject, last, 1)
        if wanted > last + 1:
            raise OutOfRange(
                reason=Reason.SEQUENCE_EXPIRED,
                message=f"start_sequence must be at most {last + 1}, the next of {subject}, got {wanted}",
                metadata={"start_sequence": str(wanted), "next_sequence": str(last + 1)},
            )
        if wanted > last and newest and _is_final(newest[0]):
            return
        woken = asyncio.Event()
        self._watchers[subject].add(woken)
        try:
            async for message in self._follow(subject, wanted, woken):
                yield message
        finally:
            self._watchers[subject].discard(woken)
            if not self._watchers[subject]:
                del self._watchers[subject]
                self._feed.forget(subject)

    async def _follow(
        self, subject: str, wanted: int, woken: asyncio.Event
    ) -> AsyncIterator[event_pb2.Event]:
        while True:
            woken.clear()
            batch = await self._feed.events(subject, wanted)
            for event in batch:
                sent_at = time.monotonic()
                yield event.message
                self._refuse_slow_reader(subject, event.sequence, time.monotonic() - sent_at)
                wanted = event.sequence + 1
                if event.final:
                    return
            if batch:
                continue
            try:
                async with asyncio.timeout(self._heartbeat_seconds):
                    await woken.wait()
            except TimeoutError:
                heartbeat = event_pb2.Event(sequence=wanted - 1)
                heartbeat.heartbeat.SetInParent()
                yield heartbeat

    def _refuse_slow_reader(self, subject: str, sequence: int, seconds: float) -> None:
        if seconds > self._slow_reader_seconds:
            raise ResourceExhausted(
                reason=Reason.SLOW_READER,
                message=(
                    f"reading one event of {subject} took {seconds:.0f} s, the limit is "
                    f"{self._slow_reader_seconds:.0f} s; watch again from sequence {sequence + 1}"
                ),
                metadata={"next_sequence": str(sequence + 1)},
            )

    async def _last_sequence(self, connection: AsyncConnection, subject: str) -> int:
        statement = select(func.max(events.c.sequence)).where(events.c.subject == subject)
        return (await connection.execute(statement)).scalar() or 0

    async def _load(self, subject: str, first: int, limit: int) -> list[Told]:
        async with self._database.reading() as connection:
            found = await self.read(connection, subject, first, limit)
        return [
            Told(sequence=event.sequence, final=_is_final(event), message=event_to_proto(event))
            for event in found
        ]

    def _wake(self, subject: str) -> None:
        if subject not in self._watchers:
            return
        self._feed.touch(subject)
        if subject not in self._waking:
            self._waking[subject] = asyncio.get_running_loop().create_task(self._wake_all(subject))

    async def _wake_all(self, subject: str) -> None:
        """Wake every watcher, a few at a time so that other calls come in between, until none has missed a commit."""
        version = -1
        try:
            while version != self._feed.version(subject):
                version = self._feed.version(subject)
                await self._feed.refresh(subject)
                await self._wake_some(tuple(self._watchers.get(subject, ())))
                await asyncio.sleep(_PAUSE_SECONDS)
        except Exception:  # watchers read for themselves, and say what is wrong
            _logger.exception("cannot read the events of %s", subject)
            await self._wake_some(tuple(self._watchers.get(subject, ())))
        finally:
            # Before anything else runs: a commit from now on starts a task of its own.
            del self._waking[subject]

    async def _wake_some(self, watchers: Sequence[asyncio.Event]) -> None:
        for place, woken in enumerate(watchers, start=1):
            woken.set()
            if place % _WOKEN_TOGETHER == 0:
                await asyncio.sleep(0)


def _is_final(event: Event) -> bool:
    return isinstance(event.entry.payload, StateChanged) and event.entry.payload.final
