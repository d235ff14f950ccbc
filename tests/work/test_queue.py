"""The queue: one holder at a time, nothing lost, nothing done twice."""

from __future__ import annotations

import asyncio
from contextvars import Context
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import event, insert, select, update
from tests.work.checkpoints import checkpoint_of

from luthier.errors import FailedPrecondition, Failure, InvalidArgument, Reason
from luthier.runtime.field_limits import count
from luthier.v1.event_pb2 import Event, MetricValues
from luthier.work import queue
from luthier.work.events import line
from luthier.work.keeping import TASK_KEEP_SECONDS
from luthier.work.schema import tasks
from luthier.work.tasks import Outcome, TaskKind
from luthier.worker.v1 import task_pb2

if TYPE_CHECKING:
    from tests.work.conftest import Bench

DONE = Outcome(result=task_pb2.TaskResult(train=task_pb2.TrainResult(step=1)))


async def test_claim_leases_the_task_queued_longest(bench: Bench) -> None:
    first = await bench.enqueue("jobs/a")
    await bench.enqueue("jobs/b")
    claimed = await bench.queue.claim("w@1", [TaskKind.TRAIN], 0.0)
    assert claimed is not None
    task, spec = claimed
    assert (task.task_id, task.epoch, task.attempt) == (first.task_id, 1, 1)
    assert spec.train.rendering_digest == "r"


async def test_claim_gives_a_task_to_one_worker_only(bench: Bench) -> None:
    for number in range(5):
        await bench.enqueue(f"jobs/{number}")
    claims = await asyncio.gather(*(bench.claim(f"w{number}@1") for number in range(12)))
    taken = [task.task_id for task in claims if task is not None]
    assert len(taken) == len(set(taken)) == 5


async def test_claim_wakes_when_a_task_arrives(bench: Bench) -> None:
    waiting = asyncio.create_task(bench.claim(wait_seconds=30.0))
    await asyncio.sleep(0.05)
    await bench.enqueue()
    assert await asyncio.wait_for(waiting, 2.0) is not None


async def test_claim_returns_none_after_the_wait(bench: Bench) -> None:
    assert await bench.claim(wait_seconds=0.05) is None


async def test_a_stale_epoch_is_refused_everywhere(bench: Bench) -> None:
    await bench.enqueue()
    task = await bench.claim()
    assert task is not None
    bench.clock.now += 11.0
    await bench.queue.expire()
    second = await bench.claim("v@1")
    assert second is not None
    assert second.epoch == 2
    stale = (task.task_id, task.epoch)
    for call in (
        bench.queue.heartbeat(*stale),
        bench.queue.report(*stale, [(1, line("late"))], None),
        bench.queue.commit_checkpoint(checkpoint_of(task, 5)),
        bench.queue.finish(*stale, DONE),
    ):
        with pytest.raises(FailedPrecondition, match=r"not leased at epoch 1.*epoch 2") as caught:
            await call
        assert caught.value.reason == Reason.LEASE_LOST
    assert "log" not in await bench.kinds()
    await bench.queue.finish(second.task_id, second.epoch, DONE)


async def test_a_result_beyond_its_limits_is_refused_by_the_queue_itself(bench: Bench) -> None:
    bench.handler.result_limits.update({"files": count(10, "files", least=1)})
    await bench.enqueue()
    task = await bench.claim()
    assert task is not None
    with pytest.raises(InvalidArgument, match=r"result\.train\.files: must hold 1 to 10 files, got 0"):
        await bench.queue.finish(task.task_id, task.epoch, DONE)
    assert bench.handler.calls == [("started", 1)]
    part = Outcome(failure=Failure(code="INTERNAL", reason="INTERNAL", message="no"), result=DONE.result)
    await bench.queue.finish(task.task_id, task.epoch, part)
    assert bench.handler.calls[-1] == ("FAILED", 1), "of a task that failed the result is a part"


async def test_expire_leaves_a_worker_that_beats_alone(bench: Bench) -> None:
    await bench.enqueue()
    task = await bench.claim()
    assert task is not None
    for _ in range(5):
        bench.clock.now += 9.0
        await bench.queue.heartbeat(task.task_id, task.epoch)
        await bench.queue.expire()
    assert ("lost", 1) not in bench.handler.calls


async def test_expire_fails_a_task_after_too_many_lost_attempts(bench: Bench) -> None:
    await bench.enqueue()
    for _ in range(3):
        assert await bench.claim() is not None
        bench.clock.now += 11.0
        await bench.queue.expire()
    assert await bench.claim() is None
    failure = bench.handler.failures[0]
    assert failure.reason == Reason.WORKER_LOST
    assert failure.message == (
        "3 attempts were lost and no checkpoint came between them, "
        "the last one because the worker was silent for 10 s"
    )
    assert (await bench.kinds()).count("LOST") == 3


@pytest.mark.parametrize("reason", [Reason.REWARD_SERVICE_UNAVAILABLE, Reason.JUDGE_UNAVAILABLE])
async def test_a_task_that_waits_for_others_in_vain_ends_with_what_it_waited_for(
    bench: Bench, reason: str
) -> None:
    await bench.enqueue()
    failure = Failure(code="UNAVAILABLE", reason=reason, message="nobody answers")
    for _ in range(3):
        task = await bench.claim()
        assert task is not None
        await bench.queue.finish(task.task_id, task.epoch, Outcome(failure=failure))
    assert bench.handler.failures == [
        Failure(
            code="UNAVAILABLE",
            reason=reason,
            message="3 attempts were lost and no checkpoint came between them, the last one because nobody answers",
            metadata={"attempts": "3"},
        )
    ]


async def test_a_task_that_makes_checkpoints_may_be_lost_any_number_of_times(bench: Bench) -> None:
    await bench.enqueue()
    for step in range(5):
        task = await bench.claim()
        assert task is not None
        await bench.queue.commit_checkpoint(checkpoint_of(task, step))
        bench.clock.now += 11.0
        await bench.queue.expire()
    assert bench.handler.failures == []
    assert await bench.claim() is not None


async def test_an_attempt_that_was_given_back_is_no_loss(bench: Bench) -> None:
    await bench.enqueue()
    stopping = Failure(code="UNAVAILABLE", reason=Reason.SHUTTING_DOWN, message="the worker shuts down")
    away = Failure(code="UNAVAILABLE", reason=Reason.NO_WORKER, message="a peer is away")
    for failure in (*[stopping] * 5, away, away):
        task = await bench.claim()
        assert task is not None
        await bench.queue.finish(task.task_id, task.epoch, Outcome(failure=failure))
    assert bench.handler.failures == []
    task = await bench.claim()
    assert task is not None
    await bench.queue.finish(task.task_id, task.epoch, Outcome(failure=away))
    assert bench.handler.failures[0].reason == Reason.WORKER_LOST


async def test_expire_spares_a_lease_that_is_renewed_while_it_waits_to_write(bench: Bench) -> None:
    await bench.enqueue()
    task = await bench.claim()
    assert task is not None
    bench.clock.now += 11.0
    async with bench.database.transaction():
        # Contexts of their own: neither is a part of this transaction.
        expiring = asyncio.create_task(bench.queue.expire(), context=Context())
        await asyncio.sleep(0.05)
        beat = bench.queue.heartbeat(task.task_id, task.epoch)
        await asyncio.create_task(beat, context=Context())
    await expiring
    await bench.queue.heartbeat(task.task_id, task.epoch)
    assert ("lost", 1) not in bench.handler.calls


async def test_recover_gives_live_leases_one_full_period(bench: Bench) -> None:
    await bench.enqueue()
    task = await bench.claim()
    assert task is not None
    bench.clock.now += 9.0
    queue = bench.successor()
    await queue.recover()
    bench.clock.now += 9.0
    await queue.expire()
    await queue.heartbeat(task.task_id, task.epoch)
    bench.clock.now += 11.0
    await queue.expire()
    with pytest.raises(FailedPrecondition):
        await queue.heartbeat(task.task_id, task.epoch)


async def test_report_records_each_local_number_once(bench: Bench) -> None:
    await bench.enqueue()
    task = await bench.claim()
    assert task is not None
    held = (task.task_id, task.epoch)
    assert await bench.queue.report(*held, [(1, line("a")), (2, line("b"))], None) == 2
    assert await bench.queue.report(*held, [(2, line("b")), (3, line("c"))], None) == 3
    assert await bench.queue.report(*held, [(1, line("a"))], None) == 3
    assert await bench.kinds() == ["STARTED", "log", "log", "log"]


async def test_report_counts_local_numbers_anew_in_each_attempt(bench: Bench) -> None:
    await bench.enqueue()
    first = await bench.claim()
    assert first is not None
    measured = Event(step=1, metrics=MetricValues(values={"train_loss": 1.0}))
    await bench.queue.report(first.task_id, first.epoch, [(1, measured)], None)
    await bench.queue.release_worker("w", "2")
    second = await bench.claim("w@2")
    assert second is not None
    await bench.queue.report(second.task_id, second.epoch, [(1, measured)], None)
    assert await bench.kinds() == ["STARTED", "metrics", "LOST", "STARTED", "metrics"]


async def test_finish_may_be_repeated(bench: Bench) -> None:
    await bench.enqueue()
    task = await bench.claim()
    assert task is not None
    await bench.queue.finish(task.task_id, task.epoch, DONE)
    await bench.queue.finish(task.task_id, task.epoch, DONE)
    assert bench.handler.calls.count(("SUCCEEDED", 1)) == 1


async def test_finish_with_a_failure_ends_the_task(bench: Bench) -> None:
    await bench.enqueue()
    task = await bench.claim()
    assert task is not None
    failure = Failure(code="INVALID_ARGUMENT", reason="INVALID_RECORDS", message="bad")
    partial = task_pb2.TaskResult(train=task_pb2.TrainResult(step=1))
    await bench.queue.finish(task.task_id, task.epoch, Outcome(failure=failure, result=partial))
    assert bench.handler.failures == [failure]
    assert bench.handler.results == [partial]
    assert await bench.claim() is None


async def test_finish_as_unavailable_queues_the_task_again(bench: Bench) -> None:
    await bench.enqueue()
    task = await bench.claim()
    assert task is not None
    failure = Failure(code="UNAVAILABLE", reason="SHUTTING_DOWN", message="the worker shuts down")
    await bench.queue.finish(task.task_id, task.epoch, Outcome(failure=failure))
    again = await bench.claim()
    assert again is not None
    assert again.attempt == 2


async def test_request_cancel_ends_a_queued_task_at_once(bench: Bench) -> None:
    task = await bench.enqueue()
    async with bench.database.transaction() as connection:
        await bench.queue.request_cancel(connection, task.uid)
    assert bench.handler.calls == [("CANCELLED", 0)]
    assert await bench.claim() is None


async def test_request_cancel_tells_the_holder(bench: Bench) -> None:
    await bench.enqueue()
    task = await bench.claim()
    assert task is not None
    async with bench.database.transaction() as connection:
        await bench.queue.request_cancel(connection, task.uid)
    assert (await bench.queue.heartbeat(task.task_id, task.epoch)).cancel_requested
    await bench.queue.finish(task.task_id, task.epoch, Outcome(cancelled=True))
    assert bench.handler.calls[-1] == ("CANCELLED", 1)


async def test_a_lost_task_that_was_to_stop_is_not_queued_again(bench: Bench) -> None:
    await bench.enqueue()
    task = await bench.claim()
    assert task is not None
    async with bench.database.transaction() as connection:
        await bench.queue.request_cancel(connection, task.uid)
    bench.clock.now += 11.0
    await bench.queue.expire()
    assert bench.handler.calls[-1] == ("CANCELLED", 1)
    assert await bench.claim() is None


async def test_release_worker_frees_only_what_its_former_process_held(bench: Bench) -> None:
    await bench.enqueue("jobs/a")
    await bench.enqueue("jobs/b")
    held = await bench.claim("w@1")
    other = await bench.claim("v@1")
    assert held is not None
    assert other is not None
    await bench.queue.release_worker("w", "1")
    await bench.queue.heartbeat(held.task_id, held.epoch)
    await bench.queue.release_worker("w", "2")
    await bench.queue.heartbeat(other.task_id, other.epoch)
    with pytest.raises(FailedPrecondition):
        await bench.queue.heartbeat(held.task_id, held.epoch)


async def test_count_shows_unfinished_tasks_by_state(bench: Bench) -> None:
    await bench.enqueue("jobs/a")
    await bench.enqueue("jobs/b")
    await bench.claim()
    await bench.look()
    for state in ("QUEUED", "LEASED"):
        labels = {"kind": "TRAIN", "state": state}
        assert bench.registry.get_sample_value("luthier_tasks", labels) == 1.0


async def test_a_task_whose_loss_cannot_be_told_does_not_keep_others_from_expiring(bench: Bench) -> None:
    for name in ("a", "b"):
        await bench.enqueue(f"jobs/{name}")
        assert await bench.claim() is not None
    bench.handler.refusals["lost jobs/a"] = KeyError("gone")
    bench.clock.now += 11.0
    await bench.queue.expire()
    assert ("lost", 1) in bench.handler.calls
    (failure,) = bench.handler.failures
    assert "KeyError: 'gone'" in failure.message
    task = await bench.claim()
    assert task is not None
    assert task.subject == "jobs/b"


async def test_finished_tasks_leave_after_their_time(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue, "FORGET_BATCH", 3)
    for number in range(10):
        await bench.enqueue(f"jobs/{number}")
        task = await bench.claim()
        assert task is not None
        await bench.queue.finish(task.task_id, task.epoch, DONE)
    await bench.enqueue("jobs/queued")
    month_us = 31 * 24 * 3600 * 1_000_000
    async with bench.database.transaction() as connection:
        old = tasks.c.subject.in_([f"jobs/{number}" for number in range(8)] + ["jobs/queued"])
        await connection.execute(
            update(tasks).where(old).values(ended_at_us=tasks.c.ended_at_us - month_us, queued_at_us=1)
        )
    await bench.queue.forget_finished(0)
    async with bench.database.reading() as connection:
        assert len((await connection.execute(select(tasks))).all()) == 11, "0: for ever"
    await bench.queue.forget_finished(TASK_KEEP_SECONDS)
    async with bench.database.reading() as connection:
        left = {row.subject for row in await connection.execute(select(tasks))}
    assert left == {"jobs/8", "jobs/9", "jobs/queued"}
    assert "state_change" in await bench.kinds("jobs/0"), "events stay"


async def test_finished_tasks_cost_a_count_and_a_claim_nothing(bench: Bench) -> None:
    async with bench.database.transaction() as connection:
        finished = [
            {
                "task_id": f"t{number}",
                "kind": "TRAIN",
                "uid": f"u{number}",
                "subject": f"jobs/{number}",
                "project": "p",
                "resources": [],
                "state": "DONE",
                "epoch": 1,
                "attempt": 1,
                "worker": "w@1",
                "cancel_requested": False,
                "last_local_number": 0,
                "queued_at_us": number,
                "ended_at_us": number + 1,
            }
            for number in range(2_000)
        ]
        await connection.execute(insert(tasks), finished)
    asked: list[tuple[str, Any]] = []

    def record(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if "tasks" in statement and not statement.startswith("INSERT"):
            asked.append((statement, parameters))

    event.listen(bench.database._engine.sync_engine, "before_cursor_execute", record)
    await bench.enqueue("jobs/live")
    await bench.look()
    assert await bench.queue.claim("w@1", [TaskKind.TRAIN, TaskKind.RENDER], 0.0, "c") is not None
    await bench.queue.recover()
    await bench.queue.release_worker("x", "1")
    await bench.queue.forget_finished(TASK_KEEP_SECONDS)
    plans = []
    async with bench.database.reading() as connection:
        for statement, parameters in list(asked):
            rows = await connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters)
            plans.append([str(list(row)[3]) for row in rows])
    assert len(plans) >= 6
    assert [line for plan in plans for line in plan if line.startswith("SCAN tasks")] == []
    found = [line for plan in plans for line in plan if "tasks" in line]
    assert all(" INDEX " in line for line in found), found
    assert any("ix_tasks_state_ended" in line for line in found), found
