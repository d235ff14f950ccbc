"""Evaluations that are dealt to several workers: states, progress, and what becomes of the whole."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from tests.evaluation.evaluations.conftest import Bench

from luthier.errors import Failure, InvalidArgument, Reason
from luthier.errors.status import status_to_failure
from luthier.v1.evaluation_pb2 import Evaluation, Prediction
from luthier.v1.event_pb2 import Event, Progress
from luthier.work.row_file import write_rows
from luthier.work.tasks import Outcome, Task, TaskKind
from luthier.worker.v1 import task_pb2, worker_service_pb2

State = Evaluation.State
SHARE = TaskKind.ANSWER_SHARE
TWO = {"max_workers": 2}
"""Of two arms with a batch each: a share is an arm."""


async def part(bench: Bench, folder: Path, arm_id: str, num_records: int = 3) -> task_pb2.TaskResult:
    """What a worker hands in for a share."""
    path = folder / f"part-{arm_id}"
    rows = [Prediction(row=row, reference=f"r{row}") for row in range(num_records)]
    for row in rows:
        row.answers.add(arm_id=arm_id, text=f"{arm_id} {row.row}")
    write_rows(path, (row.SerializeToString() for row in rows))
    blob = await bench.blobs.put_bytes(path.read_bytes())
    file = task_pb2.BlobFile(path="predictions", sha256=blob.digest)
    answers = task_pb2.AnswerShareResult(num_records=num_records, predictions=file)
    return task_pb2.TaskResult(answer_share=answers)


async def say(bench: Bench, task: Task, completed: int, number: int = 1) -> None:
    progress = Progress(phase="arm x, 1 of 1", completed=completed, total=3, unit="answers")
    await bench.queue.report(
        task.task_id, task.epoch, [(number, Event(share=task.share, progress=progress))], None
    )


async def keep(bench: Bench, task: Task, path: str) -> None:
    request = worker_service_pb2.CommitCheckpointRequest(task=task.task_id, epoch=task.epoch, step=3)
    request.files.add(path=path, sha256="f" * 64, size_bytes=1)
    await bench.queue.commit_checkpoint(request)


async def claims(bench: Bench) -> tuple[Task, Task]:
    """Both shares of an evaluation, each with a worker of its own."""
    (first, _), (second, _) = await bench.claim(SHARE), await bench.claim(SHARE, "v@1")
    return first, second


async def nothing(bench: Bench, kind: TaskKind) -> bool:
    return await bench.queue.claim("u@1", [kind], 0.0) is None


async def test_each_share_is_a_task_that_says_what_to_answer(bench: Bench) -> None:
    await bench.create(**TWO)
    assert await nothing(bench, TaskKind.EVALUATE), "the whole follows once the shares are answered"
    found = [(await bench.claim(SHARE))[1].answer_share for _ in range(2)]
    assert [one.share.number for one in found] == [1, 2]
    assert [[(rows.arm_id, rows.first_row, rows.num_rows) for rows in one.share.rows] for one in found] == [
        [("zero", 0, 3)],
        [("tuned", 0, 3)],
    ]
    assert [len(one.arms) for one in found] == [2, 2]
    assert await nothing(bench, SHARE)


@pytest.mark.parametrize("wanted", [{}, {"max_workers": 1}])
async def test_an_evaluation_that_does_not_say_has_one_task(bench: Bench, wanted: dict[str, object]) -> None:
    made = await bench.create(**wanted)
    assert made.max_workers == 1
    assert await nothing(bench, SHARE)
    _, spec = await bench.claim()
    assert not spec.evaluate.HasField("share")


@pytest.mark.parametrize("number", [-1, 65])
async def test_more_workers_than_may_be_are_refused(bench: Bench, number: int) -> None:
    said = rf"evaluation.max_workers: must be in 1..64, got {number}"
    with pytest.raises(InvalidArgument, match=said):
        await bench.create(max_workers=number)


async def test_progress_is_that_of_all_shares(bench: Bench) -> None:
    made = await bench.create(**TWO)
    first, second = await claims(bench)
    await say(bench, first, 2)
    await say(bench, second, 1)
    now = (await bench.get(made.name)).progress
    assert (now.completed, now.total, now.unit, now.phase) == (
        3,
        6,
        "answers",
        "share 2 of 2: arm x, 1 of 1",
    )
    async with bench.database.reading() as connection:
        events = await bench.log.read(connection, made.uid, 1, 100)
    told = [(one.share, one.progress.completed) for one in events if one.HasField("progress")]
    assert told == [(1, 2), (2, 3)]
    assert {one.share for one in events if one.HasField("attempt_change")} == {1, 2}


async def test_the_whole_is_queued_once_every_share_is_answered(bench: Bench, tmp_path: Path) -> None:
    made = await bench.create(**TWO)
    await asyncio.sleep(0.01)
    first, second = await claims(bench)
    await keep(bench, first, "of-first")
    await keep(bench, second, "of-second")
    for task, arm_id in ((second, "tuned"), (first, "zero")):
        assert await nothing(bench, TaskKind.EVALUATE)
        result = await part(bench, tmp_path, arm_id)
        await bench.queue.finish(task.task_id, task.epoch, Outcome(result=result))
    assert (await bench.get(made.name)).state == State.STATE_RUNNING
    whole, spec = await bench.claim()
    assert [file.path for file in spec.evaluate.checkpoint_files] == ["of-first", "of-second"]
    assert not spec.evaluate.HasField("share")
    assert whole.resources == first.resources
    assert await bench.states() == ["QUEUED", "RUNNING"]


async def test_what_is_left_of_an_evaluation_comes_before_later_ones(bench: Bench, tmp_path: Path) -> None:
    await bench.create(**TWO)
    shares = await claims(bench)
    async with bench.database.transaction() as connection:
        # Another one that was created after it, of the same family.
        first = await bench.service.family.get(connection, "projects/default/evaluations/e")
        later = first.copy()
        later.name, later.state = "projects/default/evaluations/later", State.STATE_QUEUED
        added = await bench.service.family.add(connection, later, first.private)
        await bench.service.close(connection, added)
    for task, arm_id in zip(shares, ("zero", "tuned"), strict=True):
        await bench.queue.finish(
            task.task_id, task.epoch, Outcome(result=await part(bench, tmp_path, arm_id))
        )
    taken = [(await bench.claim())[0].subject.rsplit("/", 1)[-1] for _ in range(2)]
    assert taken == ["e", "later"]


async def test_a_share_that_is_lost_waits_alone(bench: Bench) -> None:
    made = await bench.create(**TWO)
    first, second = await claims(bench)
    await say(bench, first, 2)
    await say(bench, second, 1)
    await bench.queue.release_worker("w", "2")
    now = await bench.get(made.name)
    assert (now.state, now.progress.completed) == (State.STATE_RUNNING, 1)
    await bench.queue.release_worker("v", "2")
    assert (await bench.get(made.name)).state == State.STATE_QUEUED
    await bench.claim(SHARE)
    assert await bench.states() == ["QUEUED", "RUNNING", "QUEUED", "RUNNING"]


async def test_answers_of_a_lost_share_are_given_to_its_next_worker_alone(bench: Bench) -> None:
    await bench.create(**TWO)
    first, second = await claims(bench)
    await keep(bench, first, "of-first")
    await keep(bench, second, "of-second")
    await bench.queue.release_worker("w", "2")
    again, spec = await bench.claim(SHARE, "u@1")
    assert (again.share, again.attempt) == (first.share, 2)
    assert [file.path for file in spec.answer_share.checkpoint_files] == ["of-first"]


async def test_a_share_that_fails_stops_the_others_and_what_was_answered_is_kept(
    bench: Bench, tmp_path: Path
) -> None:
    made = await bench.create(**TWO)
    first, second = await claims(bench)
    failure = Failure(code="RESOURCE_EXHAUSTED", reason=Reason.OUT_OF_MEMORY, message="too large")
    outcome = Outcome(failure=failure, result=await part(bench, tmp_path, "zero"))
    await bench.queue.finish(first.task_id, first.epoch, outcome)
    assert (await bench.get(made.name)).state == State.STATE_RUNNING, "the other worker has not stopped yet"
    assert (await bench.queue.heartbeat(second.task_id, second.epoch)).cancel_requested
    stopped = Outcome(cancelled=True, result=await part(bench, tmp_path, "tuned"))
    await bench.queue.finish(second.task_id, second.epoch, stopped)
    done = await bench.get(made.name)
    assert (done.state, done.num_records) == (State.STATE_FAILED, 3)
    assert status_to_failure(done.error) == failure
    rows = await bench.predictions(made.name, 0, 10, 1 << 20)
    assert [[(one.arm_id, one.text) for one in row.answers] for row in rows] == [
        [("zero", f"zero {row}"), ("tuned", f"tuned {row}")] for row in range(3)
    ]
    assert [row.row for row in rows] == [0, 1, 2]
    assert await nothing(bench, TaskKind.EVALUATE)


async def test_pages_of_what_shares_answered_are_cut_by_bytes_and_none_is_lost(
    bench: Bench, tmp_path: Path
) -> None:
    made = await bench.create(**TWO)
    first, second = await claims(bench)
    await bench.queue.finish(first.task_id, first.epoch, Outcome(result=await part(bench, tmp_path, "zero")))
    stopped = Outcome(cancelled=True, result=await part(bench, tmp_path, "tuned"))
    await bench.cancel(made.name)
    await bench.queue.finish(second.task_id, second.epoch, stopped)
    whole = await bench.predictions(made.name, 0, 10, 1 << 20)
    assert len(whole) == 3
    assert await bench.predictions(made.name, 1, 1, 1 << 20) == whole[1:2]
    assert await bench.predictions(made.name, 0, 3, 1) == whole[:1]
    assert await bench.predictions(made.name, 3, 3, 1 << 20) == []


async def test_a_share_that_waits_when_another_fails_ends_with_it(bench: Bench) -> None:
    made = await bench.create(**TWO)
    task, _ = await bench.claim(SHARE)
    failure = Failure(code="INVALID_ARGUMENT", reason=Reason.INVALID_RECORDS, message="row 3: no JSON")
    await bench.queue.finish(task.task_id, task.epoch, Outcome(failure=failure))
    done = await bench.get(made.name)
    assert (done.state, done.error.message) == (State.STATE_FAILED, "row 3: no JSON")
    assert await nothing(bench, SHARE)
    assert await bench.states() == ["QUEUED", "RUNNING", "FAILED"]


async def test_a_cancel_ends_what_waits_at_once_and_the_rest_with_its_workers(
    bench: Bench, tmp_path: Path
) -> None:
    made = await bench.create(**TWO)
    task, _ = await bench.claim(SHARE)
    assert (await bench.cancel(made.name)).state == State.STATE_CANCELLING
    assert await nothing(bench, SHARE)
    stopped = Outcome(cancelled=True, result=await part(bench, tmp_path, "zero"))
    await bench.queue.finish(task.task_id, task.epoch, stopped)
    done = await bench.get(made.name)
    assert (done.state, done.num_records) == (State.STATE_CANCELLED, 3)
    rows = await bench.predictions(made.name, 0, 10, 1 << 20)
    assert [[one.arm_id for one in row.answers] for row in rows] == [["zero"]] * 3


async def test_a_cancel_before_anybody_began_ends_it_at_once(bench: Bench) -> None:
    made = await bench.create(**TWO)
    assert (await bench.cancel(made.name)).state == State.STATE_CANCELLED
    assert await bench.states() == ["QUEUED", "CANCELLING", "CANCELLED"]


async def test_a_cancel_between_answers_and_scores_keeps_the_answers(bench: Bench, tmp_path: Path) -> None:
    made = await bench.create(**TWO)
    for task, arm_id in zip(await claims(bench), ("zero", "tuned"), strict=True):
        await bench.queue.finish(
            task.task_id, task.epoch, Outcome(result=await part(bench, tmp_path, arm_id))
        )
    assert (await bench.cancel(made.name)).state == State.STATE_CANCELLED
    rows = await bench.predictions(made.name, 0, 10, 1 << 20)
    assert [[one.arm_id for one in row.answers] for row in rows] == [["zero", "tuned"]] * 3


async def test_a_share_that_is_lost_too_often_fails_the_evaluation(bench: Bench) -> None:
    made = await bench.create(**TWO)
    for _ in range(2 * bench.queue.settings.max_losses):
        async with bench.database.transaction() as connection:
            for queued in await bench.queue._tasks.of_resource(connection, made.uid):
                await bench.queue._tasks.change(connection, queued.task_id, not_before_us=0)
        task, _ = await bench.claim(SHARE)
        await bench.queue.heartbeat(task.task_id, task.epoch)
        await bench.queue.release_worker("w", "2")
        if (done := await bench.get(made.name)).state == State.STATE_FAILED:
            break
    assert status_to_failure(done.error).reason == Reason.WORKER_LOST
    assert await nothing(bench, SHARE)


async def test_a_result_of_other_records_than_the_share_has_changes_nothing(
    bench: Bench, tmp_path: Path
) -> None:
    made = await bench.create(**TWO)
    task, _ = await bench.claim(SHARE)
    outcome = Outcome(result=await part(bench, tmp_path, "zero", num_records=2))
    said = "result.answer_share.num_records: must be 3, the records of the share, got 2"
    with pytest.raises(InvalidArgument, match=said):
        await bench.queue.finish(task.task_id, task.epoch, outcome)
    whole = task_pb2.TaskResult(evaluate=task_pb2.EvaluateResult(num_records=3))
    with pytest.raises(InvalidArgument, match="must be answer_share, as its task is, got evaluate"):
        await bench.queue.finish(task.task_id, task.epoch, Outcome(cancelled=True, result=whole))
    assert (await bench.get(made.name)).state == State.STATE_RUNNING
