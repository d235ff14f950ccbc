"""Jobs that are paused and go on: at once where no worker has them, with a checkpoint where one does."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from sqlalchemy import update
from tests.training.conftest import adapter_files, stored
from tests.work.checkpoints import checkpoint_of
from tests.work.conftest import attempt_kind

from luthier.errors import Aborted, FailedPrecondition, Failure, NotFound, Reason, Unavailable
from luthier.training.jobs.handler import TrainHandler
from luthier.v1.event_pb2 import Event, MetricValues
from luthier.v1.fine_tuning_job_pb2 import FineTuningJob
from luthier.work.aside import Aside, Unclaimable
from luthier.work.schema import tasks
from luthier.work.tasks import Outcome, Task, TaskKind, TaskState
from luthier.worker.v1 import task_pb2

JOB = "projects/default/fineTuningJobs/one"
PAUSED = Outcome(paused=True)
State = FineTuningJob.State


async def pause(bench: Any, name: str = JOB, etag: str = "") -> FineTuningJob:
    job: FineTuningJob = await bench.jobs.pausing.pause(name, etag)
    return job


async def resume(bench: Any, name: str = JOB, etag: str = "") -> FineTuningJob:
    job: FineTuningJob = await bench.jobs.pausing.resume(name, etag)
    return job


async def is_offered(bench: Any) -> bool:
    return await bench.queue.claim("other@1", [TaskKind.TRAIN], 0.0) is not None


async def run(bench: Any) -> Task:
    """Create the job and bring it to its first step."""
    await bench.create("one")
    return await go_on(bench)


async def go_on(bench: Any) -> Task:
    task, _ = await bench.claim()
    step = Event(step=1, metrics=MetricValues(values={"train_loss": 1.0}))
    await bench.queue.report(task.task_id, task.epoch, [(1, step)], None)
    held: Task = await bench.queue.heartbeat(task.task_id, task.epoch)
    return held


async def commit(bench: Any, task: Task, step: int) -> None:
    await bench.queue.commit_checkpoint(checkpoint_of(task, step, [await stored(bench, f"step {step}")]))


async def attempts(bench: Any) -> list[str]:
    events = await bench.jobs.family.events((await bench.job(JOB)).uid, 0, 1000)
    return [kind for event in events if (kind := attempt_kind(event))]


async def succeed(bench: Any, task: Task) -> None:
    result = task_pb2.TrainResult(files=await adapter_files(bench), step=1)
    await bench.queue.finish(task.task_id, task.epoch, Outcome(result=task_pb2.TaskResult(train=result)))


async def test_a_queued_job_is_paused_at_once_and_given_to_nobody_until_it_is_resumed(bench: Any) -> None:
    await bench.create("one")
    paused = await pause(bench)
    assert paused.state == State.STATE_PAUSED
    assert await pause(bench) == paused, "pausing twice changes nothing"
    assert not await is_offered(bench)
    assert (await resume(bench)).state == State.STATE_QUEUED
    task, spec = await bench.claim()
    assert (task.attempt, spec.train.checkpoint_step) == (1, 0)
    assert await bench.states(JOB) == ["QUEUED", "PAUSED", "QUEUED", "PREPARING"]


async def test_a_worker_that_waits_hears_of_a_resumed_job_at_once(bench: Any) -> None:
    await bench.create("one")
    await pause(bench)
    waiting = asyncio.create_task(bench.queue.claim("w@1", [TaskKind.TRAIN], 30.0))
    await asyncio.sleep(0.05)
    await resume(bench)
    assert await asyncio.wait_for(waiting, 5.0) is not None


async def test_a_running_job_pauses_once_its_worker_has_given_it_back(bench: Any) -> None:
    task = await run(bench)
    assert (await pause(bench)).state == State.STATE_PAUSING
    assert (await pause(bench)).state == State.STATE_PAUSING
    held = await bench.queue.heartbeat(task.task_id, task.epoch)
    assert (held.pause_requested, held.cancel_requested) == (True, False)
    await commit(bench, task, 7)
    await bench.queue.finish(task.task_id, task.epoch, PAUSED)
    await bench.queue.finish(task.task_id, task.epoch, PAUSED)  # its answer was lost
    assert (await bench.job(JOB)).state == State.STATE_PAUSED
    assert not await is_offered(bench)
    await resume(bench)
    again, spec = await bench.claim()
    assert (again.attempt, again.losses, again.pause_requested) == (2, 0, False)
    assert spec.train.checkpoint_step == 7
    await succeed(bench, again)
    assert await bench.states(JOB) == [
        "QUEUED",
        "PREPARING",
        "RUNNING",
        "PAUSING",
        "PAUSED",
        "QUEUED",
        "PREPARING",
        "SUCCEEDED",
    ]
    assert await attempts(bench) == ["STARTED", "PAUSED", "STARTED", "SUCCEEDED"]


async def test_a_preparing_job_pauses_without_a_checkpoint(bench: Any) -> None:
    await bench.create("one")
    task, _ = await bench.claim()
    assert (await pause(bench)).state == State.STATE_PAUSING
    await bench.queue.finish(task.task_id, task.epoch, PAUSED)
    await resume(bench)
    _, spec = await bench.claim()
    assert not spec.train.checkpoint_files


async def test_pauses_are_no_lost_attempts(bench: Any) -> None:
    await bench.create("one")
    for _ in range(7):
        task = await go_on(bench)
        await pause(bench)
        await bench.queue.finish(task.task_id, task.epoch, PAUSED)
        assert (await resume(bench)).state == State.STATE_QUEUED
    task, _ = await bench.claim()
    assert (task.losses, task.attempt) == (0, 8)


async def test_an_attempt_that_is_lost_while_pausing_pauses_its_job(bench: Any) -> None:
    task = await run(bench)
    await commit(bench, task, 4)
    await pause(bench)
    await bench.queue.release_worker("worker", "2")
    assert (await bench.job(JOB)).state == State.STATE_PAUSED
    assert not await is_offered(bench)
    await resume(bench)
    again, spec = await bench.claim()
    assert (again.losses, spec.train.checkpoint_step) == (1, 4), "that worker is gone all the same"
    assert (await attempts(bench))[:2] == ["STARTED", "LOST"]


async def test_an_attempt_that_is_given_back_while_pausing_pauses_its_job(bench: Any) -> None:
    task = await run(bench)
    await pause(bench)
    failure = Failure(code="UNAVAILABLE", reason=Reason.SHUTTING_DOWN, message="the worker shuts down")
    await bench.queue.finish(task.task_id, task.epoch, Outcome(failure=failure))
    assert (await bench.job(JOB)).state == State.STATE_PAUSED


async def test_a_worker_that_pauses_unasked_gives_the_job_back(bench: Any) -> None:
    task = await run(bench)
    await bench.queue.finish(task.task_id, task.epoch, PAUSED)
    assert (await bench.job(JOB)).state == State.STATE_QUEUED
    again, _ = await bench.claim()
    assert again.losses == 0


async def test_a_paused_job_is_cancelled_at_once(bench: Any) -> None:
    task = await run(bench)
    await pause(bench)
    await bench.queue.finish(task.task_id, task.epoch, PAUSED)
    job = await bench.cancel(JOB)
    assert job.state == State.STATE_CANCELLED
    assert job.HasField("end_time")
    assert await attempts(bench) == ["STARTED", "PAUSED"], "its only attempt had ended"
    with pytest.raises(FailedPrecondition):
        await resume(bench)


async def test_a_job_that_is_cancelled_while_pausing_ends_when_its_worker_pauses(bench: Any) -> None:
    task = await run(bench)
    await pause(bench)
    assert (await bench.cancel(JOB)).state == State.STATE_CANCELLING
    await bench.queue.finish(task.task_id, task.epoch, PAUSED)
    assert (await bench.job(JOB)).state == State.STATE_CANCELLED


@pytest.mark.parametrize("ends", ["SUCCEEDED", "FAILED"])
async def test_a_pausing_job_may_still_end(bench: Any, ends: str) -> None:
    """The worker may have been done before it heard."""
    task = await run(bench)
    await pause(bench)
    if ends == "SUCCEEDED":
        await succeed(bench, task)
    else:
        failure = Failure(code="INTERNAL", reason="INTERNAL", message="")
        await bench.queue.finish(task.task_id, task.epoch, Outcome(failure=failure))
    assert (await bench.states(JOB))[-2:] == ["PAUSING", ends]


async def queued(bench: Any) -> None:
    await bench.create("one")


async def preparing(bench: Any) -> None:
    await bench.create("one")
    await bench.claim()


async def running(bench: Any) -> None:
    await run(bench)


async def pausing(bench: Any) -> None:
    await run(bench)
    await pause(bench)


async def cancelling(bench: Any) -> None:
    await run(bench)
    await bench.cancel(JOB)


async def cancelled(bench: Any) -> None:
    await bench.create("one")
    await bench.cancel(JOB)


async def succeeded(bench: Any) -> None:
    await succeed(bench, await run(bench))


async def failed(bench: Any) -> None:
    task = await run(bench)
    failure = Failure(code="INTERNAL", reason="INTERNAL", message="")
    await bench.queue.finish(task.task_id, task.epoch, Outcome(failure=failure))


@pytest.mark.parametrize("bring", [cancelling, cancelled, succeeded, failed])
async def test_what_has_ended_or_is_stopping_is_not_paused(
    bench: Any, bring: Callable[[Any], Awaitable[None]]
) -> None:
    await bring(bench)
    before = await bench.job(JOB)
    state = State.Name(before.state).removeprefix("STATE_")
    with pytest.raises(FailedPrecondition) as caught:
        await pause(bench)
    assert caught.value.message == (
        f"{JOB} must be QUEUED or PREPARING or RUNNING to be paused, it is {state}"
    )
    assert (caught.value.reason, caught.value.metadata["state"]) == (Reason.WRONG_STATE, state)
    assert await bench.job(JOB) == before


@pytest.mark.parametrize("bring", [queued, preparing, running, cancelling, cancelled, succeeded, failed])
async def test_what_is_not_paused_is_not_resumed(bench: Any, bring: Callable[[Any], Awaitable[None]]) -> None:
    await bring(bench)
    before = await bench.job(JOB)
    state = State.Name(before.state).removeprefix("STATE_")
    with pytest.raises(FailedPrecondition) as caught:
        await resume(bench)
    assert caught.value.message == f"{JOB} must be PAUSED to be resumed, it is {state}"
    assert caught.value.reason == Reason.WRONG_STATE
    assert await bench.job(JOB) == before


async def test_what_is_still_pausing_is_resumed_later(bench: Any) -> None:
    await pausing(bench)
    with pytest.raises(FailedPrecondition, match="it is PAUSING: wait until its worker has given it back"):
        await resume(bench)


async def test_an_old_etag_and_an_unknown_name_are_refused(bench: Any) -> None:
    made = await bench.create("one")
    await bench.claim()
    with pytest.raises(Aborted, match=r'has the etag "2", got "1"'):
        await pause(bench, etag=made.etag)
    await bench.cancel(JOB)
    for call in (pause, resume):
        with pytest.raises(NotFound):
            await call(bench, f"{bench.PARENT}/fineTuningJobs/none")


async def test_a_paused_job_is_not_deleted_and_keeps_what_it_holds(bench: Any) -> None:
    await bench.create("one")
    await pause(bench)
    with pytest.raises(FailedPrecondition, match="must have ended before it is deleted, it is PAUSED"):
        await bench.jobs.delete(JOB, "")
    with pytest.raises(FailedPrecondition) as caught:
        await bench.models.family.delete(bench.MODEL, "")
    assert caught.value.reason == Reason.RESOURCE_IN_USE


async def test_paused_time_is_told_apart_from_the_time_that_a_job_took(bench: Any) -> None:
    await bench.create("one")
    before = await pause(bench)
    assert before.HasField("pause_time")
    await resume(bench)
    task = await go_on(bench)
    begun = await bench.job(JOB)
    assert (begun.HasField("pause_time"), begun.paused_seconds) == (False, 0.0), "it had not begun yet"
    await pause(bench)
    assert not (await bench.job(JOB)).HasField("pause_time"), "its worker has it still"
    await bench.queue.finish(task.task_id, task.epoch, PAUSED)
    paused = await bench.job(JOB)
    assert paused.pause_time.ToNanoseconds() >= paused.start_time.ToNanoseconds()
    await asyncio.sleep(0.3)
    assert (await resume(bench)).pause_time == paused.pause_time, "nobody works on it yet"
    await go_on(bench)
    again = await bench.job(JOB)
    assert again.start_time == paused.start_time
    assert not again.HasField("pause_time")
    assert 0.3 <= again.paused_seconds < 10.0


async def test_a_job_that_ends_while_it_is_paused_counts_the_pause(bench: Any) -> None:
    task = await run(bench)
    await pause(bench)
    await bench.queue.finish(task.task_id, task.epoch, PAUSED)
    await asyncio.sleep(0.2)
    job = await bench.cancel(JOB)
    took = (job.end_time.ToMicroseconds() - job.start_time.ToMicroseconds()) / 1e6
    assert 0.2 <= job.paused_seconds <= took
    assert not job.HasField("pause_time")


async def test_a_job_that_is_paused_again_before_a_worker_took_it_was_paused_all_the_time(bench: Any) -> None:
    task = await run(bench)
    await pause(bench)
    await bench.queue.finish(task.task_id, task.epoch, PAUSED)
    first = (await bench.job(JOB)).pause_time
    await asyncio.sleep(0.2)
    await resume(bench)
    await pause(bench)
    second = await bench.job(JOB)
    assert second.pause_time.ToMicroseconds() - first.ToMicroseconds() >= 0.2e6, (
        "it says when the last pause began"
    )
    await asyncio.sleep(0.2)
    await resume(bench)
    await go_on(bench)
    assert 0.4 <= (await bench.job(JOB)).paused_seconds < 10.0


@pytest.mark.parametrize(
    "error", [RuntimeError("it stays"), Unavailable("it passes")], ids=["stays", "passes"]
)
async def test_a_pause_that_comes_while_a_claim_fails_leaves_a_job_that_can_go_on(
    bench: Any, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    await bench.create("one")
    put = Aside.put

    async def put_after_a_pause(aside: Aside, unclaimable: Unclaimable) -> None:
        await pause(bench)
        await put(aside, unclaimable)

    async def refuse(*_: object) -> task_pb2.Task:
        raise error

    with monkeypatch.context() as broken:
        broken.setattr(Aside, "put", put_after_a_pause)
        broken.setattr(TrainHandler, "specify", refuse)
        assert not await is_offered(bench)
    assert (await bench.job(JOB)).state == State.STATE_PAUSED
    await resume(bench)
    task, _ = await bench.claim()
    await succeed(bench, task)


async def give_up(bench: Any) -> None:
    """End the tasks of the job, as where its resource could not be told of it."""
    async with bench.database.transaction() as connection:
        await connection.execute(update(tasks).values(state=TaskState.DONE))


@pytest.mark.parametrize("bring", [queued, preparing, running, pausing, cancelling])
async def test_a_job_whose_work_was_given_up_can_be_cancelled(
    bench: Any, bring: Callable[[Any], Awaitable[None]]
) -> None:
    await bring(bench)
    await give_up(bench)
    job = await bench.cancel(JOB)
    assert job.state == State.STATE_CANCELLED
    await bench.jobs.delete(JOB, "")


async def test_a_paused_job_whose_work_was_given_up_is_not_resumed_and_says_what_can_be_done(
    bench: Any,
) -> None:
    await bench.create("one")
    await pause(bench)
    await give_up(bench)
    with pytest.raises(FailedPrecondition, match=r"work that was paused to be resumed, .* cancel it"):
        await resume(bench)
    assert (await bench.cancel(JOB)).state == State.STATE_CANCELLED
