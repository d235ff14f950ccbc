"""Who watches what is purged is told that it is gone, and is shown no gap before."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from sqlalchemy import func, select
from tests.work.things import NAME, Thing, Things, things_in
from tests.work.watching import messages

from luthier.errors import NotFound, Reason
from luthier.work import purging
from luthier.work.events import line
from luthier.work.feed import CHUNK
from luthier.work.keeping import DELETED_KEEP_SECONDS
from luthier.work.purging import Purged, PurgeMetrics, Purging
from luthier.work.schema import events
from luthier.work.tasks import Outcome

LINES = 3 * CHUNK


@pytest.fixture
async def things(tmp_path: Path) -> AsyncIterator[Things]:
    async with things_in(tmp_path) as made:
        yield made


async def ended(things: Things) -> Thing:
    """A thing that has ended after much was told of it."""
    made = await things.add()
    task = await things.claim()
    assert task is not None
    async with things.database.transaction() as connection:
        await things.family._log.append(connection, made.uid, [line("said")] * LINES)
    await things.cancel()
    await things.finish(task, Outcome(cancelled=True))
    return await things.read()


async def give_up(things: Things) -> None:
    await things.family.delete(NAME, "")
    await things.family.undeleting.purge(NAME, "", "")


def purging_of(things: Things) -> Purging:
    metrics = PurgeMetrics(CollectorRegistry())
    families = [Purged(rows=things.rows)]
    return Purging(things.database, things.family._log, families, metrics, DELETED_KEEP_SECONDS)


async def number_told(things: Things, uid: str) -> int:
    """How many events of a thing there are."""
    async with things.database.reading() as connection:
        statement = select(func.count()).where(events.c.uid == uid)
        return int((await connection.execute(statement)).scalar_one())


async def seen_until_told(things: Things, watching: Any) -> list[int]:
    """The numbers that a watcher still gets, until it is told that what it watches is gone."""
    seen: list[int] = []

    async def read_on() -> None:
        async for event in watching:
            assert not event.HasField("heartbeat"), f"it waits for what is gone, after {seen[-1:]}"
            seen.append(event.sequence)

    with pytest.raises(NotFound, match=f"{NAME} was purged while it was watched: its events") as caught:
        await asyncio.wait_for(read_on(), 20.0)
    assert caught.value.reason == Reason.RESOURCE_NOT_FOUND
    log = things.family._log
    assert (log._watchers, log._purged, log._feed._chunks) == ({}, set(), {}), "nothing is kept for nobody"
    return seen


@pytest.mark.parametrize("has_read", [1, CHUNK - 1, CHUNK, CHUNK + 1])
async def test_who_is_behind_when_it_is_purged_is_told_in_place_of_waiting(
    things: Things, has_read: int
) -> None:
    made = await ended(things)
    async with aclosing(messages(things.family.watch(NAME, 0))) as watching:
        seen = [(await anext(watching)).sequence for _ in range(has_read)]
        await give_up(things)
        await purging_of(things).sweep()
        assert await number_told(things, made.uid) == 0
        seen += await seen_until_told(things, watching)
    assert seen == list(range(1, len(seen) + 1))
    assert len(seen) < LINES


async def test_who_reads_while_it_is_purged_sees_no_gap(
    things: Things, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(purging, "PURGE_BATCH", 10)
    made = await ended(things)
    async with aclosing(messages(things.family.watch(NAME, 0))) as watching:
        seen = [(await anext(watching)).sequence for _ in range(CHUNK)]
        await give_up(things)
        sweeping = asyncio.create_task(purging_of(things).sweep())
        while await number_told(things, made.uid) > LINES - CHUNK - 20:
            pass
        assert not sweeping.done()
        seen += await seen_until_told(things, watching)
        await sweeping
    assert seen == list(range(1, len(seen) + 1))


async def test_who_waits_to_begin_while_it_is_purged_is_told(things: Things) -> None:
    made = await ended(things)
    log = things.family._log
    with log.unwatched(made.uid):
        watching = aiter(messages(log.watch(made.uid, NAME, 3)))
        beginning = asyncio.ensure_future(anext(watching))
        await asyncio.sleep(0.05)
        await give_up(things)
        await purging_of(things).sweep()
    with pytest.raises(NotFound, match="was purged while it was watched: its events from 3 on"):
        await beginning
    assert (log._watchers, log._purged) == ({}, set())


async def test_who_begins_while_it_is_purged_is_told(things: Things, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its row was found before it was deleted, and nobody watched it when its events began to go."""
    monkeypatch.setattr(purging, "PURGE_BATCH", 10)
    made = await ended(things)
    log = things.family._log
    await give_up(things)
    sweeping = asyncio.create_task(purging_of(things).sweep())
    while await number_told(things, made.uid) > LINES - 20:
        pass
    for start in (0, 3):
        with pytest.raises(NotFound, match="was purged while it was watched"):
            await anext(aiter(messages(log.watch(made.uid, NAME, start))))
    assert not sweeping.done()
    await sweeping
    assert (log._watchers, log._purging, log._purged) == ({}, set(), set())


async def test_who_begins_when_it_has_been_purged_is_told(
    things: Things, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its row was found before it was deleted, and it was gone altogether when its events were looked for."""
    found = await ended(things)
    await give_up(things)
    await purging_of(things).sweep()

    async def read(_: str, __: str = "") -> Thing:
        return found

    monkeypatch.setattr(things.family, "read", read)
    with pytest.raises(NotFound) as caught:
        await asyncio.wait_for(anext(aiter(messages(things.family.watch(NAME, 0)))), 5.0)
    assert caught.value.reason == Reason.RESOURCE_NOT_FOUND


async def test_who_has_read_the_end_is_told_nothing(things: Things) -> None:
    await ended(things)
    async with aclosing(messages(things.family.watch(NAME, LINES))) as watching:
        seen = [await anext(watching)]
        await give_up(things)
        seen += [event async for event in watching]
        await purging_of(things).sweep()
    assert [event.sequence for event in seen] == list(range(LINES, LINES + len(seen)))
    assert seen[-1].state_change.state == "CANCELLED"
