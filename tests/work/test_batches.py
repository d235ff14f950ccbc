"""What is over goes a batch a transaction: no transaction takes more, and others write in between."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Sequence
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from sqlalchemy import ColumnElement, Table, Text, func, insert, select
from sqlalchemy.schema import Column
from tests.work.conftest import Bench
from tests.work.things import METADATA, NAME, State, Things, things_in

from luthier.storage import blob_refs
from luthier.storage.database import Database
from luthier.work import purging, queue, requests
from luthier.work.events import line
from luthier.work.keeping import ANSWER_KEEP_SECONDS, DELETED_KEEP_SECONDS, TASK_KEEP_SECONDS
from luthier.work.purging import Purged, PurgeMetrics, Purging
from luthier.work.requests import SqlRequestLog
from luthier.work.schema import events, request_log, tasks

PARTS = Table("batch_parts", METADATA, Column("owner", Text), Column("number", Text, primary_key=True))
BATCH, NUMBER = 10, 205
OLD_US = 1


@pytest.fixture
async def things(tmp_path: Path) -> AsyncIterator[Things]:
    async with things_in(tmp_path) as made:
        yield made


async def count(database: Database, table: Table, *which: ColumnElement[bool]) -> int:
    counted = select(func.count().label("number")).select_from(table).where(*which)
    return int((await database.rows(counted))[0]["number"])


async def fill(database: Database, table: Table, rows: Sequence[dict[str, Any]]) -> None:
    async with database.transaction() as connection:
        await connection.execute(insert(table), rows)


async def lefts(
    database: Database, work: Coroutine[Any, Any, None], table: Table, *which: ColumnElement[bool]
) -> list[int]:
    """Have something deleted while somebody else writes; return how many rows were left after each write."""
    going, left = asyncio.create_task(work), []
    while not going.done():
        async with database.transaction() as connection:
            counted = select(func.count()).select_from(table).where(*which)
            left.append(int((await connection.execute(counted)).scalar_one()))
            said = {"uid": "another", "sequence": len(left), "final": False, "event": b""}
            await connection.execute(insert(events), [said])
    await going
    return left


def require_batches(left: Sequence[int], number: int = NUMBER) -> None:
    """Writers alternate with batches: what is between two writes is one batch, or a few where one came late."""
    assert len(set(left)) > 5, f"others write in between: {left}"
    steps = [
        before - after for before, after in zip([number, *left], [*left, 0], strict=True) if before != after
    ]
    assert max(steps) < number / 2, f"no transaction takes all: {left}"


async def test_answers_are_forgotten_a_batch_a_transaction(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requests, "FORGET_BATCH", BATCH)
    database = bench.database

    def answer(principal: str, number: int, created_at_us: int) -> dict[str, Any]:
        key = {"principal": principal, "method": "/s/M", "request_id": str(number)}
        return {**key, "fingerprint": "f", "response": b"", "created_at_us": created_at_us}

    far_us = 1 << 60
    young = [answer("young", number, far_us) for number in range(NUMBER)]
    await fill(database, request_log, [answer("old", number, OLD_US) for number in range(NUMBER)] + young)
    old = request_log.c.principal == "old"
    left = await lefts(database, SqlRequestLog(database, ANSWER_KEEP_SECONDS).forget_old(), request_log, old)
    require_batches(left)
    assert await count(database, request_log, old) == 0
    assert await count(database, request_log) == NUMBER, "those of another caller by the same id are young"


async def test_finished_tasks_are_forgotten_a_batch_a_transaction(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue, "FORGET_BATCH", BATCH)
    task = await bench.enqueue("jobs/waits")
    database = bench.database
    [row] = await database.rows(select(tasks).where(tasks.c.task_id == task.task_id))
    done = [
        {**row, "task_id": f"t{number}", "uid": f"u{number}", "state": "DONE", "ended_at_us": OLD_US}
        for number in range(NUMBER)
    ]
    await fill(database, tasks, done)
    ended = tasks.c.state == "DONE"
    require_batches(await lefts(database, bench.queue.forget_finished(TASK_KEEP_SECONDS), tasks, ended))
    assert await count(database, tasks, ended) == 0
    assert await count(database, tasks) == 1, "what waits stays"


@pytest.mark.parametrize("table", [PARTS, events, blob_refs.blob_refs], ids=lambda table: str(table.name))
async def test_what_a_purged_resource_had_goes_a_batch_a_transaction(
    table: Table, things: Things, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(purging, "PURGE_BATCH", BATCH)
    database = things.database
    made = await things.move(await things.add(queued=False), State.STATE_CANCELLED)
    uid = made.uid
    owner = table.c.uid if table is events else table.c.owner
    had = await count(database, table, owner == uid)
    if table is events:
        async with database.transaction() as connection:
            await things.family._log.append(connection, uid, [line("said") for _ in range(NUMBER - had)])
    else:
        last = "number" if table is PARTS else "digest"
        await fill(database, table, [{"owner": uid, last: f"{number:064}"} for number in range(NUMBER - had)])
    await things.family.delete(NAME, "")
    await things.family.undeleting.purge(NAME, "", "")
    families = [Purged(rows=things.rows, parts=[PARTS.c.owner])]
    metrics = PurgeMetrics(CollectorRegistry())
    sweep = Purging(database, things.family._log, families, metrics, DELETED_KEEP_SECONDS).sweep()
    require_batches(await lefts(database, sweep, table, owner == uid))
    assert await count(database, table, owner == uid) == 0
    assert await count(database, things.rows.table) == 0
