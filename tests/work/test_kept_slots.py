"""A worker's last slot of a kind is kept for a project that does not hold all the others."""

from __future__ import annotations

import asyncio

import pytest
from tests.work.conftest import Bench, new_task

from luthier.work.limits import KEPT_SLOTS, PROJECT_SLOTS, SLOTS, kinds_with_room
from luthier.work.queue_figures import _with_room
from luthier.work.repository import Tasks
from luthier.work.tasks import Outcome, Task, TaskKind
from luthier.work.workers import Worker, Workers
from luthier.worker.v1 import task_pb2

RENDERED = Outcome(result=task_pb2.TaskResult(render=task_pb2.RenderResult()))


@pytest.fixture
def renders(bench: Bench) -> Bench:
    """A queue of renderings."""
    bench.queue.register(TaskKind.RENDER, bench.handler)
    return bench


async def enqueue(bench: Bench, *subjects: str, project: str) -> None:
    async with bench.database.transaction() as connection:
        for subject in subjects:
            await bench.queue.enqueue(connection, new_task(subject, TaskKind.RENDER, project))


async def claim(bench: Bench, worker: str = "w@1", wait_seconds: float = 0.0) -> Task | None:
    claimed = await bench.queue.claim(worker, [TaskKind.RENDER], wait_seconds)
    return None if claimed is None else claimed[0]


async def subjects(bench: Bench, number: int, worker: str = "w@1") -> list[str]:
    """What a worker is given, one task after the other."""
    given = [await claim(bench, worker) for _ in range(number)]
    return [task.subject for task in given if task is not None]


async def test_one_project_does_not_hold_all_slots_of_a_worker(renders: Bench) -> None:
    await enqueue(renders, "r/1", "r/2", "r/3", project="many")
    assert await subjects(renders, 3) == ["r/1", "r/2"]
    await enqueue(renders, "r/other", project="one")
    assert await subjects(renders, 2) == ["r/other"]


async def test_the_slots_of_another_worker_are_slots_of_their_own(renders: Bench) -> None:
    await enqueue(renders, *(f"r/{number}" for number in range(5)), project="many")
    assert await subjects(renders, 3, "a@1") == ["r/0", "r/1"]
    assert await subjects(renders, 3, "b@1") == ["r/2", "r/3"]


async def test_a_worker_whose_slots_two_projects_share_has_none_to_keep(renders: Bench) -> None:
    await enqueue(renders, "r/1", "r/2", project="many")
    await enqueue(renders, "r/other", project="one")
    assert await subjects(renders, 3) == ["r/1", "r/other", "r/2"]


async def test_what_waits_for_its_project_is_given_as_soon_as_one_of_it_ends(renders: Bench) -> None:
    await enqueue(renders, "r/1", "r/2", "r/3", project="many")
    first = await claim(renders)
    await claim(renders)
    assert first is not None
    waiting = asyncio.create_task(claim(renders, wait_seconds=20.0))
    await asyncio.sleep(0.1)
    assert not waiting.done()
    await renders.queue.finish(first.task_id, first.epoch, RENDERED)
    async with asyncio.timeout(5):
        given = await waiting
    assert given is not None
    assert given.subject == "r/3"


async def test_what_waits_for_its_project_is_given_as_soon_as_one_of_it_is_lost_for_good(
    renders: Bench,
) -> None:
    await enqueue(renders, "r/1", "r/2", "r/3", project="many")
    first = await claim(renders)
    await claim(renders)
    assert first is not None
    waiting = asyncio.create_task(claim(renders, wait_seconds=20.0))
    async with renders.database.transaction() as connection:
        await renders.queue.request_cancel(connection, first.uid)
    await asyncio.sleep(0.1)
    assert not waiting.done()
    await renders.queue._lose_one(first, "the worker was silent")
    async with asyncio.timeout(5):
        given = await waiting
    assert given is not None
    assert given.subject == "r/3"


def test_what_one_project_may_have_is_all_but_the_slot_that_is_kept() -> None:
    assert {kind for kind in SLOTS if PROJECT_SLOTS[kind] != SLOTS[kind]} == KEPT_SLOTS
    assert all(PROJECT_SLOTS[kind] == SLOTS[kind] - 1 >= 2 for kind in KEPT_SLOTS), "two at once, as before"


def test_a_worker_with_nothing_but_a_kept_slot_is_not_idle() -> None:
    """Else a project's third rendering would look as if it was held up by nothing."""
    worker = Worker(worker_id="w", instance="1", kinds=(TaskKind.RENDER,))
    many, one = (TaskKind.RENDER, "many"), (TaskKind.RENDER, "one")
    assert kinds_with_room(worker.kinds, [TaskKind.RENDER] * 2) == (TaskKind.RENDER,)
    assert _with_room([worker], {"w@1": [many, many]}) == {}
    assert _with_room([worker], {"w@1": [many]}) == {TaskKind.RENDER: [worker]}
    assert _with_room([worker], {"w@1": [many, one]}) == {TaskKind.RENDER: [worker]}, (
        "both may have the third"
    )
    assert _with_room([worker], {"w@1": [many, one, many]}) == {}


async def test_a_slot_that_is_open_to_all_who_have_one_is_told_as_a_turn(renders: Bench) -> None:
    present = Workers(renders.queue.metrics)
    present.register(Worker(worker_id="w", instance="1", kinds=(TaskKind.RENDER,)))
    await enqueue(renders, "r/1", "r/2", project="many")
    await enqueue(renders, "r/other", project="one")
    assert await subjects(renders, 2) == ["r/1", "r/other"]
    async with renders.database.reading() as connection:
        held = await Tasks().held_by(connection)
    assert sorted(held["w@1"]) == [(TaskKind.RENDER, "many"), (TaskKind.RENDER, "one")]
    assert list(_with_room(present.present(), held)) == [TaskKind.RENDER]
    assert await subjects(renders, 1) == ["r/2"]
