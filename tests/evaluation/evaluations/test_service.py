"""Evaluations: what is refused, and every way that one can end."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import insert, update
from tests.evaluation.evaluations.conftest import Bench
from tests.evaluation.evaluations.memory_peers import BASE, OTHER, PARENT, TUNED, VERSION
from tests.work.checkpoints import checkpoint_of

from luthier.errors import (
    Aborted,
    AlreadyExists,
    DataLoss,
    FailedPrecondition,
    Failure,
    InvalidArgument,
    LuthierError,
    NotFound,
    Reason,
    ResourceExhausted,
)
from luthier.errors.status import status_to_failure
from luthier.evaluation.evaluations.predictions import StoredEvaluation
from luthier.evaluation.evaluations.repository import evaluations
from luthier.evaluation.evaluations.rules import State
from luthier.evaluation.schema import predictions
from luthier.storage.disk import Disk
from luthier.stored.v1.evaluation_pb2 import EvaluationPrivate
from luthier.v1 import dataset_pb2, evaluation_pb2
from luthier.v1.evaluation_pb2 import EvaluationArm, Prediction
from luthier.v1.event_pb2 import Event, Progress
from luthier.v1.model_pb2 import Taught
from luthier.work.row_file import write_rows
from luthier.work.tasks import Outcome, TaskKind
from luthier.worker.v1 import task_pb2

ASKED: Mapping[str, Any] = {
    "template_source": evaluation_pb2.TEMPLATE_SOURCE_BASE,
    "template_date": "2026-11-28",
}
"""What every arm's result says of how it was asked."""


async def test_an_evaluation_from_before_askings_were_kept_is_asked_as_its_base(bench: Bench) -> None:
    made = await bench.create()
    async with bench.database.transaction() as connection:
        stored = await bench.service.family.get(connection, made.name)
        await evaluations().update(connection, stored, stored.copy(), EvaluationPrivate())
    _, spec = await bench.claim()
    assert [arm.arm for arm in spec.evaluate.arms] == list(made.arms)
    assert not any(arm.HasField("asking") for arm in spec.evaluate.arms)


async def test_each_arm_has_its_base_and_shares_have_those_of_one_base_together(bench: Bench) -> None:
    arms = [("zero", BASE), ("far", OTHER), ("tuned", TUNED)]
    made = await bench.create(
        arms=[EvaluationArm(arm_id=one, model=model) for one, model in arms], max_workers=3
    )
    assert [arm.base_model for arm in made.arms] == [BASE, OTHER, BASE]
    dealt = [(await bench.claim(TaskKind.ANSWER_SHARE))[1].answer_share for _ in range(3)]
    assert [[row.arm_id for row in spec.share.rows] for spec in dealt] == [["zero"], ["tuned"], ["far"]]
    for spec in dealt:
        assert not spec.HasField("base_model"), "a worker that knows only one base cannot ask them"
        assert [arm.base_model.name for arm in spec.arms] == [BASE, OTHER, BASE]
        assert [arm.adapter.name for arm in spec.arms] == ["", "", TUNED]


async def test_an_evaluation_from_before_arms_said_their_bases_has_one(bench: Bench) -> None:
    made = await bench.create()
    async with bench.database.transaction() as connection:
        stored = await bench.service.family.get(connection, made.name)
        old = stored.copy()
        for arm in old.arms:
            arm.ClearField("base_model")
        await evaluations().update(connection, stored, old, EvaluationPrivate(base_model=BASE))
    _, spec = await bench.claim()
    assert spec.evaluate.base_model.name == BASE
    assert [(arm.base_model.name, arm.adapter.name) for arm in spec.evaluate.arms] == [
        (BASE, ""),
        (BASE, TUNED),
    ]


async def test_the_way_each_arm_is_asked_is_pinned_at_creation(bench: Bench) -> None:
    bench.peers.taught[TUNED] = Taught(chat_template="t", template_date="2026-01-01", stop_token_ids=[5])
    bench.peers.templates = False
    await bench.create()
    del bench.peers.taught[TUNED]
    _, spec = await bench.claim()
    zero, tuned = spec.evaluate.arms
    for arm in (zero, tuned):
        assert arm.asking.template_source == evaluation_pb2.TEMPLATE_SOURCE_TAUGHT
        assert (arm.asking.chat_template, arm.asking.template_date) == ("t", "2026-01-01")
        assert (list(arm.asking.prefix.token_ids), list(arm.asking.stop_token_ids)) == ([], [5])
        assert arm.asking.HasField("prefix")


async def test_create_pins_what_it_builds_on(bench: Bench) -> None:
    made = await bench.create()
    assert dict(made.model_digests) == {BASE: "digest-base", TUNED: "digest-tuned"}
    assert made.dataset_digest == "dv"
    spec = (await bench.claim())[1].evaluate
    assert [arm.HasField("adapter") for arm in spec.arms] == [False, True]
    assert (spec.base_model.name, spec.base_model.digest) == (BASE, "digest-base")


async def test_an_adapter_alone_brings_its_base_model(bench: Bench) -> None:
    made = await bench.create(arms=[EvaluationArm(arm_id="tuned", model=TUNED)])
    assert set(made.model_digests) == {BASE, TUNED}


@pytest.mark.parametrize(
    ("changes", "kind", "said"),
    [
        ({"arms": []}, InvalidArgument, "must hold 1 to 16 arms, got 0"),
        ({"arms": [EvaluationArm(arm_id="a", model=BASE)] * 2}, InvalidArgument, "got 'a' 2 times"),
        ({"arms": [EvaluationArm(arm_id="A!", model=BASE)]}, InvalidArgument, "got 'A!'"),
        (
            {"arms": [EvaluationArm(arm_id="a", model=BASE, num_shots=65)]},
            InvalidArgument,
            "must be in 0..64, got 65",
        ),
        ({"arms": [EvaluationArm(arm_id="a", model="m")]}, InvalidArgument, "got 'm'"),
        ({"max_records": -1}, InvalidArgument, "got -1"),
        ({"max_new_tokens": 10_000}, InvalidArgument, "must be in 1..8192, got 10000"),
        ({"arms": [EvaluationArm(arm_id="a", model=f"{PARENT}/models/none")]}, NotFound, "does not exist"),
        (
            {
                "arms": [EvaluationArm(arm_id="a", model=BASE), EvaluationArm(arm_id="b", model=OTHER)],
                "metrics": [evaluation_pb2.EVALUATION_METRIC_PERPLEXITY],
            },
            InvalidArgument,
            "must not have PERPLEXITY where arms are not known to have one tokenizer",
        ),
        ({"labels": {"Bad Key": "x"}}, InvalidArgument, "got 'Bad Key'"),
        ({"display_name": "a\x1b[31m"}, InvalidArgument, "evaluation.display_name: must hold no control"),
    ],
)
async def test_a_bad_evaluation_is_refused(
    bench: Bench, changes: dict[str, object], kind: type[LuthierError], said: str
) -> None:
    with pytest.raises(kind) as caught:
        await bench.create(**changes)
    assert said in caught.value.message
    assert await bench.queue.claim("w@1", [TaskKind.EVALUATE], 0.0) is None, "nothing was queued"


async def test_what_is_not_ready_cannot_be_evaluated(bench: Bench) -> None:
    bench.peers.state[TUNED] = "FAILED"
    with pytest.raises(FailedPrecondition, match="must be READY, it is FAILED"):
        await bench.create()


async def test_an_id_is_used_once(bench: Bench) -> None:
    await bench.create()
    with pytest.raises(AlreadyExists):
        await bench.create()


async def test_an_evaluation_that_succeeds_keeps_every_answer(bench: Bench, tmp_path: Path) -> None:
    made = await bench.create()
    task, spec = await bench.claim()
    assert spec.evaluate.evaluation.name == made.name
    progress = Progress(phase="arm zero, 1 of 2", completed=1, total=6, unit="answers")
    await bench.queue.report(task.task_id, task.epoch, [(1, Event(progress=progress))], None)
    running = await bench.get(made.name)
    assert running.HasField("progress")
    assert running.progress.completed == 1

    rows = [evaluation_pb2.Prediction(row=row, reference=f"r{row}") for row in range(3)]
    path = tmp_path / "predictions"
    write_rows(path, (row.SerializeToString() for row in rows))
    blob = await bench.blobs.put_bytes(path.read_bytes())
    outcome = task_pb2.EvaluateResult(
        arm_results=[
            evaluation_pb2.ArmResult(arm_id="zero", num_cut=1, **ASKED),
            evaluation_pb2.ArmResult(arm_id="tuned", **ASKED),
        ],
        comparisons=[
            evaluation_pb2.Comparison(
                candidate_arm_id="tuned",
                baseline_arm_id="zero",
                score="exact_match",
                p_value=0.25,
                verdict=evaluation_pb2.VERDICT_BETTER,
                kind=evaluation_pb2.SCORE_KIND_BINARY,
                direction=evaluation_pb2.SCORE_DIRECTION_HIGHER_IS_BETTER,
            )
        ],
        num_records=3,
        predictions=task_pb2.BlobFile(path="predictions", sha256=blob.digest),
    )
    result = task_pb2.TaskResult(evaluate=outcome)
    await bench.queue.finish(task.task_id, task.epoch, Outcome(result=result))
    done = await bench.get(made.name)
    assert done.state == evaluation_pb2.Evaluation.STATE_SUCCEEDED
    assert (done.num_records, done.arm_results[0].num_cut, done.comparisons[0].p_value) == (3, 1, 0.25)
    assert done.HasField("end_time")
    stored = await bench.predictions(made.name, 1, 10, 1 << 20)
    assert [row.reference for row in stored] == ["r1", "r2"]
    assert await bench.states() == ["QUEUED", "RUNNING", "SUCCEEDED"]


async def test_an_evaluation_that_fails_says_why(bench: Bench) -> None:
    made = await bench.create()
    task, _ = await bench.claim()
    failure = Failure(code="INVALID_ARGUMENT", reason="INVALID_RECORDS", message="row 3: no JSON")
    await bench.queue.finish(task.task_id, task.epoch, Outcome(failure=failure))
    failed = await bench.get(made.name)
    assert (failed.error.code, failed.error.message) == (3, "row 3: no JSON")
    assert failed.HasField("end_time")
    told = (await bench.changes())[-1]
    assert (told.state, told.message) == ("FAILED", "row 3: no JSON")
    assert status_to_failure(told.error) == failure
    with pytest.raises(FailedPrecondition, match="must be SUCCEEDED to have predictions, it is FAILED"):
        await bench.predictions(made.name, 0, 10, 1 << 20)


async def stored_as_rows(bench: Bench) -> tuple[StoredEvaluation, list[Prediction]]:
    """An evaluation that SUCCEEDED when its predictions were rows of the database, of 9 bytes each."""
    made = await bench.create()
    found = [Prediction(row=row, reference=f"ref {row}") for row in range(1, 6)]
    assert {row.ByteSize() for row in found} == {9}
    async with bench.database.transaction() as connection:
        stored = await bench.service.family.get(connection, made.name)
        for state in (State.STATE_RUNNING, State.STATE_SUCCEEDED):
            stored = await bench.service.family.move(connection, stored, state)
        rows = [
            {"owner": stored.uid, "row": row, "prediction": one.SerializeToString()}
            for row, one in enumerate(found)
        ]
        await connection.execute(insert(predictions), rows)
    return await bench.service.family.read(made.name), found


async def test_predictions_that_an_older_version_stored_as_rows_are_read(bench: Bench) -> None:
    done, rows = await stored_as_rows(bench)
    name = done.message.name
    assert not done.private.HasField("predictions")
    assert await bench.predictions(name, 1, 3, 1 << 20) == rows[1:4]
    assert await bench.predictions(name, 1, 3, 20) == rows[1:3]
    assert await bench.predictions(name, 4, 3, 1) == rows[4:]


async def test_a_prediction_that_cannot_be_read_is_lost_data(bench: Bench) -> None:
    done, _ = await stored_as_rows(bench)
    async with bench.database.transaction() as connection:
        await connection.execute(update(predictions).values(prediction=b"\xff\xff"))
    with pytest.raises(DataLoss, match="a stored prediction of 2 bytes cannot be read"):
        await bench.predictions(done.message.name, 0, 3, 1 << 20)


async def test_a_queued_evaluation_is_cancelled_at_once(bench: Bench) -> None:
    made = await bench.create()
    assert (await bench.cancel(made.name)).state == State.STATE_CANCELLED
    assert (await bench.cancel(made.name)).state == State.STATE_CANCELLED
    assert await bench.states() == ["QUEUED", "CANCELLING", "CANCELLED"]


async def test_a_running_evaluation_is_cancelled_by_its_worker(bench: Bench) -> None:
    made = await bench.create()
    task, _ = await bench.claim()
    assert (await bench.cancel(made.name)).state == State.STATE_CANCELLING
    assert (await bench.queue.heartbeat(task.task_id, task.epoch)).cancel_requested
    await bench.queue.finish(task.task_id, task.epoch, Outcome(cancelled=True))
    assert (await bench.get(made.name)).state == State.STATE_CANCELLED


async def test_a_stale_etag_is_aborted(bench: Bench) -> None:
    made = await bench.create()
    with pytest.raises(Aborted, match='has the etag "1", got "9"'):
        await bench.cancel(made.name, '"9"')


async def test_the_etag_outlives_progress_but_no_other_change(bench: Bench) -> None:
    made = await bench.create()
    task, _ = await bench.claim()
    seen = await bench.get(made.name)
    for completed in range(1, 4):
        progress = Progress(
            phase="arm a", completed=completed, total=9, unit="answers", remaining_seconds=1.0
        )
        await bench.queue.report(task.task_id, task.epoch, [(completed, Event(progress=progress))], None)
    now = await bench.get(made.name)
    assert (now.etag, now.progress.completed) == (seen.etag, 3)
    assert (await bench.cancel(made.name, seen.etag)).state == State.STATE_CANCELLING
    with pytest.raises(Aborted):
        await bench.cancel(made.name, seen.etag)


async def test_a_lost_attempt_is_queued_again(bench: Bench) -> None:
    await bench.create()
    await bench.claim()
    await bench.queue.release_worker("w", "2")
    await bench.claim()
    changes = await bench.changes()
    assert [change.state for change in changes] == ["QUEUED", "RUNNING", "QUEUED", "RUNNING"]
    assert [change.message for change in changes] == ["", "", "the attempt was lost", ""]


async def test_a_lost_attempt_of_an_evaluation_that_is_being_cancelled_ends_it(bench: Bench) -> None:
    made = await bench.create()
    await bench.claim()
    await bench.cancel(made.name)
    await bench.queue.release_worker("w", "2")
    assert (await bench.get(made.name)).state == State.STATE_CANCELLED
    assert await bench.queue.claim("w@2", [TaskKind.EVALUATE], 0.0) is None


async def test_answers_of_a_lost_attempt_are_given_to_the_next_and_go_with_the_end(bench: Bench) -> None:
    made = await bench.create()
    task, spec = await bench.claim()
    assert list(spec.evaluate.checkpoint_files) == []
    for step, path in ((64, "a"), (130, "b"), (64, "again")):
        files = [task_pb2.BlobFile(path=path, sha256="f" * 64, size_bytes=step)]
        await bench.queue.commit_checkpoint(checkpoint_of(task, step, files))
    await bench.queue.release_worker("w", "2")
    task, spec = await bench.claim()
    kept = [(file.path, file.size_bytes) for file in spec.evaluate.checkpoint_files]
    assert kept == [("a", 64), ("b", 130)]
    await bench.queue.finish(task.task_id, task.epoch, Outcome(cancelled=True))
    async with bench.database.reading() as connection:
        left = await bench.service.spec(connection, made.uid)
    assert list(left.checkpoint_files) == []


async def test_a_success_that_crosses_a_cancel_is_kept(bench: Bench, tmp_path: Path) -> None:
    made = await bench.create()
    task, _ = await bench.claim()
    await bench.cancel(made.name)
    path = tmp_path / "predictions"
    write_rows(path, iter([evaluation_pb2.Prediction().SerializeToString()]))
    blob = await bench.blobs.put_bytes(path.read_bytes())
    outcome = task_pb2.EvaluateResult(
        arm_results=[evaluation_pb2.ArmResult(arm_id=arm.arm_id, **ASKED) for arm in made.arms],
        num_records=1,
        predictions=task_pb2.BlobFile(path="predictions", sha256=blob.digest),
    )
    await bench.queue.finish(task.task_id, task.epoch, Outcome(result=task_pb2.TaskResult(evaluate=outcome)))
    assert (await bench.get(made.name)).state == State.STATE_SUCCEEDED


async def test_a_result_whose_predictions_are_no_predictions_changes_nothing(bench: Bench) -> None:
    made = await bench.create()
    task, _ = await bench.claim()
    blob = await bench.blobs.put_bytes(b'{"row": 0}\n{"no_such_field": 1}\n')
    for num_records in (0, 2, 3, 4000, -1):
        outcome = task_pb2.EvaluateResult(
            arm_results=[evaluation_pb2.ArmResult(arm_id=arm.arm_id, **ASKED) for arm in made.arms],
            num_records=num_records,
            predictions=task_pb2.BlobFile(path="predictions", sha256=blob.digest),
        )
        said = (
            f"must be a file of {num_records} rows" if num_records > 0 else r"num_records: must be in 1\.\."
        )
        with pytest.raises(InvalidArgument, match=said):
            await bench.queue.finish(
                task.task_id, task.epoch, Outcome(result=task_pb2.TaskResult(evaluate=outcome))
            )
    assert (await bench.get(made.name)).state == State.STATE_RUNNING


async def test_an_empty_split_is_refused_with_what_there_is(bench: Bench) -> None:
    with pytest.raises(FailedPrecondition, match=r"no record in the VALIDATION split.*'TEST': 3"):
        await bench.create(split=dataset_pb2.SPLIT_VALIDATION)


async def test_create_below_the_floor_of_the_disk_is_refused(bench: Bench, tmp_path: Path) -> None:
    bench.database.disk = Disk(tmp_path, 1 << 60)
    with pytest.raises(ResourceExhausted, match="must stay free") as caught:
        await bench.create()
    assert caught.value.reason == Reason.DISK_FULL


async def test_what_it_builds_on_is_held_until_it_ends(bench: Bench) -> None:
    made = await bench.create()
    await bench.elsewhere.sweep()
    assert bench.keeper.holders() == sorted((name, made.name) for name in (VERSION, BASE, TUNED))
    await bench.cancel(made.name)
    await bench.elsewhere.sweep()
    assert bench.keeper.holders() == []


async def test_an_evaluation_that_cannot_be_stored_holds_nothing(bench: Bench) -> None:
    made = await bench.create()
    with pytest.raises(AlreadyExists):
        await bench.create()
    await bench.elsewhere.sweep()
    assert {holder for _, holder in bench.keeper.holders()} == {made.name}
    assert len(bench.keeper.holders()) == 3
