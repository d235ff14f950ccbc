"""A task that nobody can be given says so after a minute, once, and no longer when somebody can."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import select
from tests.work.conftest import Clock, uid_of
from tests.work.things import State, Things, things_in

from luthier.errors.status import status_to_failure
from luthier.storage.disk import disk_full
from luthier.v1.event_pb2 import LogLine
from luthier.work.log import EventLog
from luthier.work.requirements import GIB, Equipment, Requirements
from luthier.work.schema import tasks
from luthier.work.tasks import TaskKind
from luthier.work.waiting import PATIENCE_SECONDS, WaitingTasks
from luthier.work.workers import Worker

if TYPE_CHECKING:
    from tests.work.conftest import Bench

CUDA = Requirements(device="CUDA", memory_bytes=24 * GIB)
CPU_WORKER = Worker(
    worker_id="small",
    instance="1",
    kinds=(TaskKind.TRAIN,),
    equipment=Equipment(device="CPU", memory_bytes=16 * GIB),
)
CUDA_WORKER = Worker(
    worker_id="large",
    instance="1",
    kinds=(TaskKind.TRAIN,),
    equipment=Equipment(device="CUDA", memory_bytes=80 * GIB),
)


def test_nobody_is_told_before_a_minute() -> None:
    assert PATIENCE_SECONDS == 60.0


class Room:
    """The workers that are heard of, as a test says."""

    def __init__(self) -> None:
        self.workers: list[Worker] = []

    def present(self) -> Sequence[Worker]:
        return self.workers


class Looker:
    """What looks at a queue, on a clock that is moved by hand."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.clock = Clock()
        self.room = Room()
        self.waiting = self.made()

    def made(self) -> WaitingTasks:
        bench = self.bench
        handlers = {TaskKind.TRAIN: bench.handler}
        return WaitingTasks(bench.database, bench.log, handlers, self.room, clock=self.clock)

    async def look(self, after_seconds: float = 0.0) -> dict[str, str]:
        self.clock.now += after_seconds
        await self.waiting.look()
        return {subject: text for subject, text in self.bench.handler.waiting.items() if text}

    async def lines(self, subject: str = "jobs/a") -> list[tuple[int, str]]:
        async with self.bench.database.reading() as connection:
            events = await self.bench.log.read(connection, uid_of(subject), 1, 1000)
        return [(event.log.severity, event.log.text) for event in events if event.HasField("log")]


@pytest.fixture
def looker(bench: Bench) -> Looker:
    return Looker(bench)


async def test_it_says_so_after_a_minute_with_what_is_required_and_what_there_is(looker: Looker) -> None:
    looker.room.workers = [CPU_WORKER]
    await looker.bench.enqueue(required=CUDA)
    assert await looker.look() == {}
    assert await looker.look(PATIENCE_SECONDS - 1) == {}
    text = (
        "no worker that is there can do it: it requires a CUDA device with at least 24.0 GiB; "
        "small has CPU with 16.0 GiB"
    )
    assert await looker.look(1) == {"jobs/a": text}
    assert await looker.lines() == [(LogLine.SEVERITY_WARNING, text)]


async def test_it_says_it_no_longer_as_soon_as_a_worker_is_there_that_can(looker: Looker) -> None:
    await looker.bench.enqueue(required=CUDA)
    await looker.look()
    assert await looker.look(PATIENCE_SECONDS)
    looker.room.workers = [CUDA_WORKER]
    assert await looker.look() == {}
    assert looker.bench.handler.waiting == {"jobs/a": ""}


async def test_an_event_tells_of_it_once_whatever_workers_come_and_go(looker: Looker) -> None:
    await looker.bench.enqueue(required=CUDA)
    said = []
    for workers in ([], [CPU_WORKER], [CUDA_WORKER], [CPU_WORKER], []):
        looker.room.workers = workers
        await looker.look()
        said.append((await looker.look(PATIENCE_SECONDS)).get("jobs/a", ""))
    assert [bool(text) for text in said] == [True, True, False, True, True]
    assert said[0] != said[1], "what the workers have is what it is now"
    assert [text for _, text in await looker.lines()] == [said[0]]


async def test_a_worker_that_is_away_for_less_than_a_minute_is_not_missed(looker: Looker) -> None:
    await looker.bench.enqueue()
    for _ in range(5):
        looker.room.workers = []
        await looker.look()
        assert await looker.look(PATIENCE_SECONDS - 1) == {}
        looker.room.workers = [CPU_WORKER]
        await looker.look()
    assert await looker.lines() == []


async def test_tasks_that_somebody_can_do_say_nothing_beside_one_that_nobody_can(looker: Looker) -> None:
    looker.room.workers = [CPU_WORKER]
    await looker.bench.enqueue("jobs/a", required=CUDA)
    await looker.bench.enqueue("jobs/b")
    await looker.bench.enqueue("jobs/c", required=Requirements(memory_bytes=17 * GIB))
    await looker.look()
    said = await looker.look(PATIENCE_SECONDS)
    assert sorted(said) == ["jobs/a", "jobs/c"]
    assert "requires a device with at least 17.0 GiB" in said["jobs/c"]


async def test_all_of_many_are_told(looker: Looker) -> None:
    for number in range(230):
        await looker.bench.enqueue(f"jobs/{number}")
    await looker.look()
    assert len(await looker.look(PATIENCE_SECONDS)) == 230
    looker.room.workers = [CPU_WORKER]
    assert await looker.look() == {}


async def test_workers_that_cannot_do_it_come_and_go_and_words_are_renewed_once_a_minute(
    looker: Looker,
) -> None:
    looker.room.workers = [CPU_WORKER]
    await looker.bench.enqueue(required=CUDA)
    await looker.look()
    before = (await looker.look(PATIENCE_SECONDS))["jobs/a"]
    looker.bench.handler.waiting.clear()
    small, other = [CPU_WORKER], [CPU_WORKER, replace(CPU_WORKER, worker_id="other")]
    told = []
    for seconds in range(1, 124):
        looker.room.workers = other if seconds % 2 else small
        if await looker.look(1.0):
            told.append(seconds)
        looker.bench.handler.waiting.clear()
    assert told == [1, 62, 123], "at once, since the words were old, and once a minute from then on"
    await looker.bench.enqueue("jobs/b", required=CUDA)
    looker.room.workers = small
    assert list(await looker.look()) == ["jobs/b"], "who comes is told what the others are"
    looker.room.workers = []
    said = await looker.look(1.0)
    assert sorted(said) == ["jobs/a", "jobs/b"], "another requirement is said at once"
    assert before not in said.values()


@pytest.mark.parametrize(
    ("error", "severity"), [(KeyError("surprise"), "ERROR"), (disk_full("no room"), "INFO")]
)
async def test_one_that_cannot_be_told_keeps_no_other_from_it(
    looker: Looker, caplog: pytest.LogCaptureFixture, error: Exception, severity: str
) -> None:
    caplog.set_level(logging.INFO, "luthier.work.waiting")
    looker.room.workers = [CPU_WORKER]
    for number in range(4):
        await looker.bench.enqueue(f"jobs/{number}", required=Requirements(memory_bytes=(20 + number) * GIB))
    await looker.look()
    looker.bench.handler.refusals["waits jobs/2"] = error
    assert sorted(await looker.look(PATIENCE_SECONDS)) == ["jobs/0", "jobs/1", "jobs/3"]
    assert [one.levelname for one in caplog.records if one.levelname != "WARNING"] == [severity]
    looker.bench.handler.refusals.clear()
    assert len(await looker.look(1.0)) == 4


async def test_after_a_restart_what_is_said_stays_until_a_worker_registers_again(looker: Looker) -> None:
    await looker.bench.enqueue(required=CUDA)
    await looker.look()
    before = await looker.look(PATIENCE_SECONDS)
    looker.waiting = looker.made()
    looker.bench.handler.waiting.clear()
    assert await looker.look() == {}, "nothing is written: it is said already"
    assert await looker.look(PATIENCE_SECONDS) == {}
    looker.room.workers = [CUDA_WORKER]
    await looker.look()
    assert before
    assert looker.bench.handler.waiting == {"jobs/a": ""}


async def test_a_task_that_was_taken_and_lost_waits_a_minute_anew(looker: Looker) -> None:
    await looker.bench.enqueue()
    await looker.look()
    assert await looker.look(PATIENCE_SECONDS)
    task = await looker.bench.claim()
    assert task is not None
    await looker.look()
    async with looker.bench.database.reading() as connection:
        assert (await connection.execute(select(tasks.c.said))).scalar_one() == ""
    looker.bench.handler.waiting.clear()
    await looker.bench.queue.release_worker("w", "2")
    assert await looker.look() == {}
    assert await looker.look(PATIENCE_SECONDS)
    assert len(await looker.lines()) == 1, "it was told of before"


@pytest.fixture
async def things(tmp_path: Path) -> AsyncIterator[Things]:
    async with things_in(tmp_path) as made:
        yield made


async def test_a_resource_shows_it_and_its_etag_stays(things: Things) -> None:
    clock, room = Clock(), Room()
    handlers = {TaskKind.EVALUATE: things.tasks}
    looked = WaitingTasks(things.database, EventLog(things.database), handlers, room, clock=clock)
    before = await things.add()
    await looked.look()
    clock.now += PATIENCE_SECONDS
    await looked.look()
    shown = (await things.read()).message
    failure = status_to_failure(shown.waiting)
    assert (failure.reason, failure.metadata["requirement"]) == ("NO_FITTING_WORKER", "kind")
    assert failure.message == "no evaluation worker is there to do it; start one: luthierd worker evaluation"
    assert shown.etag == before.message.etag
    (told,) = [event for event in await things.events() if event.HasField("log")]
    assert told.log.text == failure.message
    room.workers = [Worker(worker_id="e", instance="1", kinds=(TaskKind.EVALUATE,))]
    await looked.look()
    assert not (await things.read()).message.HasField("waiting")


@pytest.mark.parametrize("ends", ["claimed", "cancelled"])
async def test_what_is_worked_for_or_ended_does_not_wait(things: Things, ends: str) -> None:
    clock = Clock()
    handlers = {TaskKind.EVALUATE: things.tasks}
    looked = WaitingTasks(things.database, EventLog(things.database), handlers, Room(), clock=clock)
    await things.add()
    await looked.look()
    clock.now += PATIENCE_SECONDS
    await looked.look()
    if ends == "claimed":
        assert await things.claim() is not None
    else:
        await things.cancel()
    now = (await things.read()).message
    assert now.state == (State.STATE_RUNNING if ends == "claimed" else State.STATE_CANCELLED)
    assert not now.HasField("waiting")
    await looked.look()
    assert not (await things.read()).message.HasField("waiting")
