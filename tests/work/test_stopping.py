"""Tasks that are paused in the queue: given to nobody, through restarts and losses, until they are queued again."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from tests.work.checkpoints import checkpoint_of

from luthier.errors import FailedPrecondition, Reason
from luthier.work.tasks import Outcome, Task, TaskState
from luthier.worker.v1 import task_pb2

if TYPE_CHECKING:
    from tests.work.conftest import Bench

PAUSED = Outcome(paused=True)


async def pause(bench: Bench, uid: str) -> None:
    async with bench.database.transaction() as connection:
        await bench.queue.request_pause(connection, uid)


async def resume(bench: Bench, uid: str) -> None:
    async with bench.database.transaction() as connection:
        await bench.queue.resume(connection, uid)


async def held(bench: Bench) -> Task:
    await bench.enqueue()
    task = await bench.claim()
    assert task is not None
    return task


def shown(bench: Bench, state: str) -> float | None:
    return bench.registry.get_sample_value("luthier_tasks", {"kind": "TRAIN", "state": state})


def attempts_that_ended(bench: Bench, outcome: str) -> float | None:
    labels = {"kind": "TRAIN", "outcome": outcome, "reason": "NONE"}
    return bench.registry.get_sample_value("luthier_task_attempts_total", labels)


async def test_a_pause_outlives_a_restart_of_the_service_and_the_loss_of_the_worker(bench: Bench) -> None:
    task = await held(bench)
    await pause(bench, task.uid)
    bench.queue = bench.successor()
    await bench.queue.recover()
    assert (await bench.queue.heartbeat(task.task_id, task.epoch)).pause_requested, "it goes on to be told"
    bench.clock.now += 11.0
    await bench.queue.expire()
    assert bench.handler.calls[-1] == ("paused", 1)
    bench.queue = bench.successor()
    await bench.queue.recover()
    assert await bench.claim() is None
    await resume(bench, task.uid)
    again = await bench.claim()
    assert again is not None
    assert again.epoch > task.epoch
    assert (again.losses, again.pause_requested) == (1, False)


RESULT = Outcome(result=task_pb2.TaskResult(train=task_pb2.TrainResult()))
ENDS = {"result": RESULT, "paused": PAUSED, "cancelled": Outcome(cancelled=True)}


@pytest.mark.parametrize("outcome", ENDS.values(), ids=ENDS)
async def test_what_a_worker_brings_of_an_attempt_that_was_lost_while_pausing_is_refused(
    bench: Bench, outcome: Outcome
) -> None:
    task = await held(bench)
    await pause(bench, task.uid)
    bench.clock.now += 11.0
    await bench.queue.expire()
    with pytest.raises(FailedPrecondition) as caught:
        await bench.queue.finish(task.task_id, task.epoch, outcome)
    assert caught.value.reason == Reason.LEASE_LOST
    assert bench.handler.calls[-1] == ("paused", 1)


async def test_the_pause_of_an_attempt_that_was_lost_before_is_refused(bench: Bench) -> None:
    task = await held(bench)
    bench.clock.now += 11.0
    await bench.queue.expire()
    await pause(bench, task.uid)
    with pytest.raises(FailedPrecondition, match="is not leased at epoch 1: it is PAUSED"):
        await bench.queue.finish(task.task_id, task.epoch, PAUSED)


async def test_only_a_pause_is_repeated_once_an_attempt_has_paused(bench: Bench) -> None:
    task = await held(bench)
    await pause(bench, task.uid)
    await bench.queue.finish(task.task_id, task.epoch, PAUSED)
    await bench.queue.finish(task.task_id, task.epoch, PAUSED)
    with pytest.raises(FailedPrecondition, match="it is PAUSED at epoch 1; drop it"):
        await bench.queue.finish(task.task_id, task.epoch, RESULT)


@pytest.mark.parametrize("stopping", [False, True])
async def test_a_result_of_the_last_attempt_that_may_be_lost_is_refused_after_it(
    bench: Bench, stopping: bool
) -> None:
    task = await held(bench)
    if stopping:
        async with bench.database.transaction() as connection:
            await bench.queue.request_cancel(connection, task.uid)
    for _ in range(2 * (not stopping)):
        bench.clock.now += 11.0
        await bench.queue.expire()
        again = await bench.claim()
        assert again is not None
        task = again
    bench.clock.now += 11.0
    await bench.queue.expire()
    assert bench.handler.calls[-1][0] == ("CANCELLED" if stopping else "FAILED")
    with pytest.raises(FailedPrecondition, match="it is DONE"):
        await bench.queue.finish(task.task_id, task.epoch, RESULT)


async def test_the_last_attempt_that_may_be_lost_pauses_and_the_next_one_fails(bench: Bench) -> None:
    for _ in range(2):
        if not bench.handler.calls:
            await bench.enqueue()
        assert await bench.claim() is not None
        bench.clock.now += 11.0
        await bench.queue.expire()
    task = await bench.claim()
    assert task is not None
    await pause(bench, task.uid)
    bench.clock.now += 11.0
    await bench.queue.expire()
    assert (bench.handler.calls[-1], bench.handler.failures) == (("paused", 3), [])
    await resume(bench, task.uid)
    assert await bench.claim() is not None
    bench.clock.now += 11.0
    await bench.queue.expire()
    assert bench.handler.failures[0].message.startswith("4 attempts were lost")


async def test_a_checkpoint_before_the_pause_forgives_losses(bench: Bench) -> None:
    await held(bench)
    bench.clock.now += 11.0
    await bench.queue.expire()
    task = await bench.claim()
    assert task is not None
    assert task.losses == 1
    await pause(bench, task.uid)
    await bench.queue.commit_checkpoint(checkpoint_of(task, 3))
    await bench.queue.finish(task.task_id, task.epoch, PAUSED)
    await resume(bench, task.uid)
    again = await bench.claim()
    assert again is not None
    assert again.losses == 0


async def test_a_paused_task_frees_its_worker_and_its_projects_turn(bench: Bench) -> None:
    task = await held(bench)
    await bench.enqueue("jobs/b")
    await pause(bench, task.uid)
    await bench.queue.finish(task.task_id, task.epoch, PAUSED)
    other = await bench.claim()
    assert other is not None
    assert other.subject == "jobs/b"
    await bench.enqueue("jobs/c")
    await resume(bench, task.uid)
    assert [(await bench.claim()).subject for _ in range(2)] == ["jobs/c", "jobs/a"], "it waits anew"  # type: ignore[union-attr]


async def test_a_cancel_ends_a_paused_task(bench: Bench) -> None:
    task = await held(bench)
    await pause(bench, task.uid)
    await bench.queue.finish(task.task_id, task.epoch, PAUSED)
    async with bench.database.transaction() as connection:
        await bench.queue.request_cancel(connection, task.uid)
    assert bench.handler.calls[-1] == ("CANCELLED", 1)
    await resume(bench, task.uid)
    assert await bench.claim() is None, "a finished task is not queued again"


async def test_metrics_tell_paused_tasks_from_those_that_wait(bench: Bench) -> None:
    task = await held(bench)
    await pause(bench, task.uid)
    await bench.look()
    assert (shown(bench, "LEASED"), shown(bench, "PAUSED")) == (1, 0)
    await bench.queue.finish(task.task_id, task.epoch, PAUSED)
    await bench.look()
    assert (shown(bench, "LEASED"), shown(bench, "QUEUED"), shown(bench, "PAUSED")) == (0, 0, 1)
    waiting = [
        sample
        for family in bench.registry.collect()
        if family.name in ("luthier_tasks_waiting", "luthier_task_oldest_waiting_seconds")
        for sample in family.samples
        if sample.value
    ]
    assert waiting == [], "nobody needs to look for a worker"
    assert (attempts_that_ended(bench, "paused"), attempts_that_ended(bench, "lost")) == (1, None)
    await resume(bench, task.uid)
    await bench.look()
    assert (shown(bench, "QUEUED"), shown(bench, "PAUSED")) == (1, 0)


async def test_what_a_task_said_of_waiting_is_over_when_it_is_paused(bench: Bench) -> None:
    task = await bench.enqueue()
    async with bench.database.transaction() as connection:
        (group,) = await bench.queue._tasks.queued_groups(connection)
        await bench.queue._tasks.say(connection, group, "nobody is there", 10)
    await pause(bench, task.uid)
    await resume(bench, task.uid)
    async with bench.database.reading() as connection:
        (group,) = await bench.queue._tasks.queued_groups(connection)
        found = await bench.queue._tasks.get(connection, task.task_id)
    assert group.said == ""
    assert found is not None
    assert found.state is TaskState.QUEUED
