"""What every family does alike as its tasks go on, told by a real queue."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.work.checkpoints import FILE, checkpoint_of
from tests.work.things import NAME, State, Things, things_in

from luthier.errors import FailedPrecondition, Failure, Reason
from luthier.v1.event_pb2 import Event, Progress
from luthier.v1.fine_tuning_job_pb2 import RunRecord
from luthier.work.events import line
from luthier.work.tasks import Outcome, Task
from luthier.worker.v1 import task_pb2
from luthier.worker.v1.worker_service_pb2 import CommitRolloutsRequest


@pytest.fixture
async def things(tmp_path: Path) -> AsyncIterator[Things]:
    async with things_in(tmp_path) as made:
        yield made


async def begun(things: Things) -> Task:
    await things.add()
    task = await things.claim()
    assert task is not None
    return await things.queue.heartbeat(task.task_id, task.epoch)


async def test_a_resource_is_begun_with_its_task(things: Things) -> None:
    await things.add()
    assert await things.states() == ["QUEUED"]
    assert await things.claim() is not None
    assert (await things.read()).message.state == State.STATE_RUNNING
    assert await things.states() == ["QUEUED", "RUNNING"]


async def test_a_lost_attempt_queues_it_and_the_next_begins_it_again(things: Things) -> None:
    await begun(things)
    await things.queue.release_worker("w", "2")
    assert (await things.read()).message.state == State.STATE_QUEUED
    again = await things.claim()
    assert again is not None
    assert again.attempt == 2
    assert await things.states() == ["QUEUED", "RUNNING", "QUEUED", "RUNNING"]


async def test_what_stops_on_request_is_cancelled_and_its_result_let_go(things: Things) -> None:
    task = await begun(things)
    await things.cancel()
    known = task_pb2.TaskResult(evaluate=task_pb2.EvaluateResult(num_records=3))
    await things.finish(task, Outcome(cancelled=True, result=known))
    ended = (await things.read()).message
    assert (ended.state, ended.num_records) == (State.STATE_CANCELLED, 0)
    assert ended.HasField("end_time")


async def test_a_lost_attempt_of_what_is_to_stop_ends_it(things: Things) -> None:
    await begun(things)
    await things.cancel()
    await things.queue.release_worker("w", "2")
    assert (await things.read()).message.state == State.STATE_CANCELLED
    assert await things.claim() is None


async def test_a_report_is_kept_as_its_events_alone(things: Things) -> None:
    task = await begun(things)
    before = await things.read()
    progress = Progress(phase="a", completed=1, total=2, unit="x")
    told_of = [line("line", attempt=1), Event(progress=progress)]
    await things.queue.report(
        task.task_id, task.epoch, list(enumerate(told_of, start=1)), RunRecord(device="cpu")
    )
    assert (await things.read()).message == before.message
    told = await things.events()
    assert [event.log.text for event in told if event.HasField("log")] == ["line"]
    assert [event.progress.completed for event in told if event.HasField("progress")] == [1]


async def test_a_checkpoint_is_refused_where_there_are_none(things: Things) -> None:
    task = await begun(things)
    with pytest.raises(FailedPrecondition, match="tasks of kind EVALUATE have no checkpoints") as caught:
        await things.queue.commit_checkpoint(checkpoint_of(task, 1))
    assert caught.value.reason == Reason.WRONG_STATE
    assert caught.value.metadata == {"task": task.task_id}
    assert (await things.read()).message.state == State.STATE_RUNNING


async def test_rollouts_are_refused_where_there_are_none(things: Things) -> None:
    task = await begun(things)
    request = CommitRolloutsRequest(task=task.task_id, epoch=task.epoch, step=1, file=FILE, num_rollouts=1)
    with pytest.raises(FailedPrecondition, match="tasks of kind EVALUATE have no rollouts") as caught:
        await things.queue.commit_rollouts(request)
    assert caught.value.reason == Reason.WRONG_STATE
    assert caught.value.metadata == {"task": task.task_id}
    assert (await things.read()).message.state == State.STATE_RUNNING


async def test_a_failure_ends_it_with_its_reason(things: Things) -> None:
    task = await begun(things)
    failure = Failure(code="INVALID_ARGUMENT", reason="INVALID_RECORDS", message="bad")
    await things.finish(task, Outcome(failure=failure))
    ended = await things.read(NAME)
    assert (ended.message.state, ended.message.error.message) == (State.STATE_FAILED, "bad")


async def test_a_task_that_begins_while_its_resource_has_ended_is_set_aside(things: Things) -> None:
    """The table of moves is the last to be asked: what has ended never runs again."""
    added = await things.add()
    await things.move(added, State.STATE_CANCELLED)
    assert await things.claim() is None
    assert (await things.read()).message.state == State.STATE_CANCELLED
    assert await things.states() == ["QUEUED", "CANCELLED"]
