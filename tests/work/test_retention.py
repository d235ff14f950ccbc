"""What ended long ago keeps its last event, and whoever asks for another is told where the log begins."""

from __future__ import annotations

import asyncio
import shutil
import time
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import event, select, text
from tests.stores import database_url, open_database
from tests.work.things import NAME, things_in
from tests.work.watching import messages

from luthier.errors import OutOfRange, Reason
from luthier.storage.database import Database
from luthier.storage.migrations import upgrade
from luthier.v1.event_pb2 import Event
from luthier.work import retention
from luthier.work.events import line, state_changed
from luthier.work.feed import CHUNK
from luthier.work.keeping import EVENT_KEEP_SECONDS
from luthier.work.log import EventLog
from luthier.work.retention import EventRetention
from luthier.work.schema import MIGRATIONS, events
from luthier.work.tasks import Outcome

if TYPE_CHECKING:
    from tests.work.conftest import Bench

DAY = 86_400.0


def later(
    bench: Any, seconds: float = EVENT_KEEP_SECONDS + DAY, keep_seconds: float = EVENT_KEEP_SECONDS
) -> EventRetention:
    """Retention at a later time."""
    return EventRetention(bench.database, bench.log, keep_seconds, lambda: time.time() + seconds)


async def told(bench: Bench, uid: str, number: int, *, ended: bool = True) -> None:
    """A log of so many events, the last of which is its end."""
    lines = [line(str(one)) for one in range(1, number)]
    async with bench.database.transaction() as connection:
        await bench.log.append(connection, uid, [*lines, state_changed("SUCCEEDED")], final=ended)


async def kept(database: Database, uid: str) -> list[int]:
    statement = select(events.c.sequence).where(events.c.uid == uid).order_by(events.c.sequence)
    return [row["sequence"] for row in await database.rows(statement)]


async def watched(bench: Bench, uid: str, start: int = 0) -> list[int]:
    async with asyncio.timeout(10.0):
        return [event.sequence async for event in messages(bench.log.watch(uid, "jobs/a", start))]


async def test_what_ended_long_ago_keeps_its_last_event_and_nothing_else_loses_any(bench: Bench) -> None:
    await told(bench, "old", 3 * CHUNK + 5)
    await told(bench, "going on", 5, ended=False)
    await later(bench, EVENT_KEEP_SECONDS - DAY).trim()
    assert len(await kept(bench.database, "old")) == 3 * CHUNK + 5, "its time is not over"
    await later(bench, keep_seconds=0).trim()
    assert len(await kept(bench.database, "old")) == 3 * CHUNK + 5, "0: for ever"
    await later(bench).trim()
    assert await kept(bench.database, "old") == [3 * CHUNK + 5]
    assert await kept(bench.database, "going on") == [1, 2, 3, 4, 5]


async def test_whoever_watches_what_is_trimmed_gets_its_end_or_is_told_where_the_log_begins(
    bench: Bench,
) -> None:
    last = 2 * CHUNK + 7
    await told(bench, "old", last)
    await later(bench).trim()
    assert await watched(bench, "old") == [last]
    assert await watched(bench, "old", last) == [last]
    assert await watched(bench, "old", last + 1) == [], "it is read already"
    for start in (1, CHUNK, last - 1):
        with pytest.raises(OutOfRange, match=f"event {start} of jobs/a is gone: .*begin at {last}") as caught:
            await watched(bench, "old", start)
        assert caught.value.reason == Reason.SEQUENCE_EXPIRED
        assert caught.value.metadata == {"start_sequence": str(start), "first_sequence": str(last)}
    with pytest.raises(OutOfRange, match=f"must be at most {last + 1}"):
        await watched(bench, "old", last + 2)


async def test_a_trim_that_was_cut_off_leaves_no_gap_and_goes_on(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "TRIM_BATCH", 10)
    await told(bench, "old", CHUNK + 40)
    transaction, begun = bench.database.transaction, 0

    def third_fails(**options: Any) -> Any:
        nonlocal begun
        begun += 1
        if begun == 3:
            raise RuntimeError("cut off")
        return transaction(**options)

    with monkeypatch.context() as patched:
        patched.setattr(bench.database, "transaction", third_fails)
        with pytest.raises(RuntimeError, match="cut off"):
            await later(bench).trim()
    assert await kept(bench.database, "old") == list(range(21, CHUNK + 41))
    assert await watched(bench, "old") == list(range(21, CHUNK + 41))
    assert await watched(bench, "old", CHUNK) == list(range(CHUNK, CHUNK + 41))
    await later(bench).trim()
    assert await kept(bench.database, "old") == [CHUNK + 40]
    async with bench.database.transaction() as connection:
        await bench.log.append(connection, "old", [line("more")])
    assert await kept(bench.database, "old") == [CHUNK + 40, CHUNK + 41], "no number is given twice"


async def test_others_write_between_two_batches(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "TRIM_BATCH", 10)
    await told(bench, "old", 400)
    trimming = asyncio.create_task(later(bench).trim())
    left = []
    while not trimming.done():
        async with bench.database.transaction() as connection:
            await bench.log.append(connection, "other", [line("said")])
        left.append(len(await kept(bench.database, "old")))
    await trimming
    assert len(set(left)) > 3, "they need not wait for the whole"
    assert await kept(bench.database, "old") == [400]


async def test_what_is_watched_is_trimmed_when_nobody_watches_it_any_more(bench: Bench) -> None:
    await told(bench, "old", 600)
    await told(bench, "older", 3)
    async with aclosing(messages(bench.log.watch("old", "jobs/a"))) as stream:
        seen = [(await anext(stream)).sequence]
        await later(bench).trim()
        assert await kept(bench.database, "older") == [3], "it keeps no other"
        seen += [event.sequence async for event in stream]
    assert seen == list(range(1, 601))
    await later(bench).trim()
    assert await kept(bench.database, "old") == [600]


async def test_who_begins_to_watch_what_is_being_trimmed_gets_what_is_left(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And waits for one batch, not for all."""
    monkeypatch.setattr(retention, "TRIM_BATCH", 10)
    await told(bench, "old", 900)
    trimming = asyncio.create_task(later(bench).trim())
    while len(await kept(bench.database, "old")) > 850:
        pass
    seen = await watched(bench, "old")
    await trimming
    assert 1 < seen[0] < 890, "some are gone, and not all"
    assert seen == list(range(seen[0], 901))
    await later(bench).trim()
    assert await kept(bench.database, "old") == [900]


async def test_what_is_due_is_found_without_reading_events_that_are_not(bench: Bench) -> None:
    await told(bench, "young", 50)
    asked: list[tuple[str, Any]] = []

    def record(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if statement.startswith("SELECT"):
            asked.append((statement, parameters))

    event.listen(bench.database._reader, "before_cursor_execute", record)
    await later(bench, seconds=0).trim()
    [(statement, parameters)] = asked
    async with bench.database.reading() as connection:
        plan = await connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters)
        steps = [str(row.detail) for row in plan]
    [step] = [step for step in steps if "events" in step]
    assert step.startswith("SEARCH events USING INDEX ix_events_ended")


async def test_who_begins_to_watch_what_is_being_trimmed_waits(bench: Bench) -> None:
    await told(bench, "old", 9)
    with bench.log.unwatched("old") as is_unwatched:
        assert is_unwatched
        watching = asyncio.create_task(watched(bench, "old"))
        await asyncio.sleep(0.05)
        assert not watching.done()
        async with bench.database.transaction() as connection:
            await connection.execute(text("DELETE FROM events WHERE sequence < 9"))
    assert await watching == [9]
    assert bench.log._trimming == {}


async def test_a_page_whose_events_are_gone_is_refused(tmp_path: Path) -> None:
    async with things_in(tmp_path) as things:
        await things.add(NAME)
        task = await things.claim()
        assert task is not None
        await things.cancel(NAME)
        await things.finish(task, Outcome(cancelled=True))
        uid = (await things.read(NAME)).uid
        log = things.family._log
        assert (await things.family.events(uid, 0, 10))[0].sequence == 1
        await EventRetention(
            things.database, log, EVENT_KEEP_SECONDS, lambda: time.time() + 2 * EVENT_KEEP_SECONDS
        ).trim()
        [last] = await things.family.events(uid, 0, 10)
        assert last.state_change.state == "CANCELLED"
        assert await things.family.events(uid, last.sequence - 1, 10) == [last]
        with pytest.raises(
            OutOfRange, match=f"after 1 of .*{uid} are gone: .*without a page_token: .* event {last.sequence}"
        ) as caught:
            await things.family.events(uid, 1, 10)
        assert caught.value.reason == Reason.SEQUENCE_EXPIRED
        assert caught.value.metadata == {"first_sequence": str(last.sequence)}
        assert "begin at" not in caught.value.message, "a list has tokens, and no number to begin at"


async def test_what_ended_before_ends_were_remembered_is_trimmed_too(tmp_path: Path) -> None:
    former = tmp_path / "former"
    shutil.copytree(
        MIGRATIONS, former, ignore=shutil.ignore_patterns("work_001[6-9]*", "work_00[2-9]*", "__pycache__")
    )
    url = database_url(tmp_path / "old")
    await asyncio.to_thread(upgrade, url, [former])
    database = open_database(tmp_path / "old")
    rows: list[dict[str, Any]] = []
    for uid, days in (("old", 100), ("young", 10)):
        for sequence in (1, 2, 3):
            said = Event(sequence=sequence)
            said.event_time.FromSeconds(round(time.time() - days * DAY))
            is_last = sequence == 3
            rows.append(
                {"uid": uid, "sequence": sequence, "final": is_last, "event": said.SerializeToString()}
            )
    async with database.transaction() as connection:
        written = "INSERT INTO events (uid, sequence, final, event) VALUES (:uid, :sequence, :final, :event)"
        await connection.execute(text(written), rows)
    await database.close()
    await asyncio.to_thread(upgrade, url, [MIGRATIONS])
    database = open_database(tmp_path / "old")
    try:
        await EventRetention(database, EventLog(database), EVENT_KEEP_SECONDS).trim()
        assert (await kept(database, "old"), await kept(database, "young")) == ([3], [1, 2, 3])
    finally:
        await database.close()
