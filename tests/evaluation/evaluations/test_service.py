"""Evaluations on a real database and queue: what is refused, and every way that one can end."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from sqlalchemy import insert, text
from tests.evaluation.evaluations.memory_peers import BASE, OTHER, PARENT, TUNED, VERSION, MemoryPeers

from luthier.errors import (
    Aborted,
    AlreadyExists,
    FailedPrecondition,
    Failure,
    InvalidArgument,
    LuthierError,
    NotFound,
    Reason,
    ResourceExhausted,
)
from luthier.evaluation.asking import Taught
from luthier.evaluation.evaluations.convert import (
    evaluation_to_proto,
    evaluation_to_spec,
)
from luthier.evaluation.evaluations.domain import (
    Arm,
    Evaluation,
    EvaluationState,
    Split,
    moved,
)
from luthier.evaluation.evaluations.prediction_file import write_predictions
from luthier.evaluation.evaluations.repository import MIGRATIONS, evaluation_resources, metadata, predictions
from luthier.evaluation.evaluations.service import EvaluationService
from luthier.evaluation.servicer import EvaluateHandler
from luthier.storage.database import Database
from luthier.storage.disk import Disk
from luthier.storage.memory_blobs import MemoryBlobStore
from luthier.storage.migrations import differences, upgrade
from luthier.v1 import evaluation_pb2
from luthier.work import schema
from luthier.work.events import Entry, Progressed
from luthier.work.log import EventLog
from luthier.work.metrics import WorkMetrics
from luthier.work.queue import Queue, QueueSettings
from luthier.work.tasks import Outcome, Task, TaskKind
from luthier.worker.v1 import task_pb2

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def draft(**changes: object) -> Evaluation:
    base = Evaluation(
        name="",
        uid="",
        state=EvaluationState.QUEUED,
        labels={},
        create_time=NOW,
        update_time=NOW,
        revision=1,
        dataset_version=VERSION,
        arms=(Arm(arm_id="zero", model=BASE), Arm(arm_id="tuned", model=TUNED)),
    )
    return replace(base, **changes)  # type: ignore[arg-type]


@dataclass
class Bench:
    """A service, its queue and its blobs."""

    service: EvaluationService
    queue: Queue
    blobs: MemoryBlobStore
    log: EventLog
    database: Database
    peers: MemoryPeers

    async def create(self, **changes: object) -> Evaluation:
        return await self.service.create(PARENT, draft(**changes), "e")

    async def claim(self) -> tuple[Task, task_pb2.Task]:
        claimed = await self.queue.claim("w@1", [TaskKind.EVALUATE], 0.0)
        assert claimed is not None
        return claimed

    async def states(self, name: str = "e") -> list[str]:
        async with self.database.reading() as connection:
            events = await self.log.read(connection, f"{PARENT}/evaluations/{name}", 1, 100)
        return [
            state for event in events if (state := getattr(event.entry.payload, "state", None)) is not None
        ]


async def test_a_row_from_before_askings_were_kept_is_asked_as_its_base(bench: Bench) -> None:
    made = await bench.create()
    async with bench.database.transaction() as connection:
        since = "'$.askings', '$.arms[0].chat_template', '$.arms[0].template'"
        await connection.execute(text(f"UPDATE evaluations SET body = json_remove(body, {since})"))
    old = await bench.service.get(made.name)
    assert (old.askings, old.arms) == ({}, made.arms)
    _, spec = await bench.claim()
    assert not any(arm.HasField("asking") for arm in spec.evaluate.arms)


async def test_the_way_each_arm_is_asked_is_pinned_at_creation(bench: Bench) -> None:
    taught = Taught(chat_template="t", template_date="2026-01-01", prefix_token_ids=None, stop_token_ids=(5,))
    bench.peers.taught[TUNED] = taught
    bench.peers.templates = False
    made = await bench.create()
    del bench.peers.taught[TUNED]
    _, spec = await bench.claim()
    zero, tuned = spec.evaluate.arms
    for arm in (zero, tuned):
        assert arm.asking.template_source == evaluation_pb2.TEMPLATE_SOURCE_TAUGHT
        assert (arm.asking.chat_template, arm.asking.template_date) == ("t", "2026-01-01")
        assert (arm.asking.HasField("prefix"), list(arm.asking.stop_token_ids)) == (False, [5])
    assert (await bench.service.get(made.name)).askings == made.askings


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    url = f"sqlite+aiosqlite:///{tmp_path / 'evaluation.db'}"
    upgrade(url, (schema.MIGRATIONS, MIGRATIONS))
    database = Database(url)
    log, peers, blobs = EventLog(database), MemoryPeers(), MemoryBlobStore()
    queue = Queue(database, log, WorkMetrics(CollectorRegistry(), (TaskKind.EVALUATE,)), QueueSettings())
    service = EvaluationService(database, evaluation_resources(), log, queue, peers, ("default",), blobs)
    queue.register(TaskKind.EVALUATE, EvaluateHandler(service, blobs))
    yield Bench(service, queue, blobs, log, database, peers)
    await database.close()


def test_the_migrated_schema_is_the_declared_one(tmp_path: Path) -> None:
    url = f"sqlite+aiosqlite:///{tmp_path / 'e.db'}"
    upgrade(url, (MIGRATIONS,))
    assert differences(url, metadata) == []


async def test_create_pins_what_it_builds_on(bench: Bench) -> None:
    made = await bench.create()
    assert made.base_model == BASE
    assert made.model_digests == {BASE: "digest-base", TUNED: "digest-tuned"}
    assert made.dataset_digest == "dv"
    spec = evaluation_to_spec(made, ())
    assert [arm.HasField("adapter") for arm in spec.arms] == [False, True]
    assert (spec.base_model.name, spec.base_model.digest) == (BASE, "digest-base")


async def test_an_adapter_alone_brings_its_base_model(bench: Bench) -> None:
    made = await bench.create(arms=(Arm(arm_id="tuned", model=TUNED),))
    assert set(made.model_digests) == {BASE, TUNED}


@pytest.mark.parametrize(
    ("changes", "kind", "said"),
    [
        ({"arms": ()}, InvalidArgument, "must hold 1 to 16 arms, got 0"),
        ({"arms": (Arm(arm_id="a", model=BASE),) * 2}, InvalidArgument, "got 'a' 2 times"),
        ({"arms": (Arm(arm_id="A!", model=BASE),)}, InvalidArgument, "got 'A!'"),
        ({"arms": (Arm(arm_id="a", model=BASE, num_shots=65),)}, InvalidArgument, "must be in 0..64, got 65"),
        ({"arms": (Arm(arm_id="a", model="m"),)}, InvalidArgument, "got 'm'"),
        ({"max_records": -1}, InvalidArgument, "got -1"),
        ({"max_new_tokens": 10_000}, InvalidArgument, "must be in 1..8192, got 10000"),
        (
            {"dataset_version": "projects/x/datasets/d/versions/v"},
            InvalidArgument,
            "must be in projects/default",
        ),
        ({"arms": (Arm(arm_id="a", model=f"{PARENT}/models/none"),)}, NotFound, "does not exist"),
        (
            {"arms": (Arm(arm_id="a", model=BASE), Arm(arm_id="b", model=OTHER))},
            InvalidArgument,
            "all arms must share one base model",
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
    progress = Progressed(phase="arm zero, 1 of 2", completed=1, total=6, unit="answers")
    await bench.queue.report(task.task_id, task.epoch, [(1, Entry(payload=progress))], None)
    running = await bench.service.get(made.name)
    assert running.progress is not None
    assert running.progress.completed == 1

    rows = [evaluation_pb2.Prediction(row=row, reference=f"r{row}") for row in range(3)]
    path = tmp_path / "predictions"
    write_predictions(path, (row.SerializeToString() for row in rows))
    blob = await bench.blobs.put_bytes(path.read_bytes())
    outcome = task_pb2.EvaluateResult(
        arm_results=[evaluation_pb2.ArmResult(arm_id="zero", num_cut=1)],
        comparisons=[
            evaluation_pb2.Comparison(
                candidate_arm_id="tuned",
                baseline_arm_id="zero",
                score="exact_match",
                p_value=0.25,
                verdict=evaluation_pb2.VERDICT_BETTER,
            )
        ],
        num_records=3,
        predictions=task_pb2.BlobFile(sha256=blob.digest),
    )
    result = task_pb2.TaskResult(evaluate=outcome)
    await bench.queue.finish(task.task_id, task.epoch, Outcome(result=result))
    done = evaluation_to_proto(await bench.service.get(made.name))
    assert done.state == evaluation_pb2.Evaluation.STATE_SUCCEEDED
    assert (done.num_records, done.arm_results[0].num_cut, done.comparisons[0].p_value) == (3, 1, 0.25)
    assert done.HasField("end_time")
    stored = await bench.service.predictions(await bench.service.get(made.name), 1, 10, 1 << 20)
    assert [evaluation_pb2.Prediction.FromString(row).reference for row in stored] == ["r1", "r2"]
    assert await bench.states() == ["QUEUED", "RUNNING", "SUCCEEDED"]


async def test_an_evaluation_that_fails_says_why(bench: Bench) -> None:
    made = await bench.create()
    task, _ = await bench.claim()
    failure = Failure(code="INVALID_ARGUMENT", reason="INVALID_RECORDS", message="row 3: no JSON")
    await bench.queue.finish(task.task_id, task.epoch, Outcome(failure=failure))
    failed = evaluation_to_proto(await bench.service.get(made.name))
    assert (failed.error.code, failed.error.message) == (3, "row 3: no JSON")
    with pytest.raises(FailedPrecondition, match="must be SUCCEEDED to have predictions, it is FAILED"):
        await bench.service.predictions(await bench.service.get(made.name), 0, 10, 1 << 20)


async def test_predictions_that_an_older_version_stored_as_rows_are_read(bench: Bench) -> None:
    made = await bench.create()
    async with bench.database.transaction() as connection:
        for state in (EvaluationState.RUNNING, EvaluationState.SUCCEEDED):
            stored, _ = await bench.service.find(connection, made.name)
            await evaluation_resources().update(connection, replace(moved(stored, state, NOW), num_records=5))
        rows = [{"evaluation": made.name, "row": row, "prediction": b"%d" % row * 10} for row in range(5)]
        await connection.execute(insert(predictions), rows)
    done = await bench.service.get(made.name)
    assert done.predictions is None
    assert await bench.service.predictions(done, 1, 3, 1 << 20) == [b"1" * 10, b"2" * 10, b"3" * 10]
    assert await bench.service.predictions(done, 1, 3, 25) == [b"1" * 10, b"2" * 10]
    assert await bench.service.predictions(done, 4, 3, 1) == [b"4" * 10]


async def test_a_queued_evaluation_is_cancelled_at_once(bench: Bench) -> None:
    made = await bench.create()
    assert (await bench.service.cancel(made.name, "")).state is EvaluationState.CANCELLED
    assert (await bench.service.cancel(made.name, "")).state is EvaluationState.CANCELLED
    assert await bench.states() == ["QUEUED", "CANCELLING", "CANCELLED"]


async def test_a_running_evaluation_is_cancelled_by_its_worker(bench: Bench) -> None:
    made = await bench.create()
    task, _ = await bench.claim()
    assert (await bench.service.cancel(made.name, "")).state is EvaluationState.CANCELLING
    assert (await bench.queue.heartbeat(task.task_id, task.epoch)).cancel_requested
    await bench.queue.finish(task.task_id, task.epoch, Outcome(cancelled=True))
    assert (await bench.service.get(made.name)).state is EvaluationState.CANCELLED


async def test_a_stale_etag_is_aborted(bench: Bench) -> None:
    made = await bench.create()
    with pytest.raises(Aborted, match='has the etag "1", got "9"'):
        await bench.service.cancel(made.name, '"9"')


async def test_the_etag_outlives_progress_but_no_other_change(bench: Bench) -> None:
    made = await bench.create()
    task, _ = await bench.claim()
    seen = await bench.service.get(made.name)
    for completed in range(1, 4):
        progress = Progressed(
            phase="arm a", completed=completed, total=9, unit="answers", remaining_seconds=1.0
        )
        await bench.queue.report(task.task_id, task.epoch, [(completed, Entry(payload=progress))], None)
    now = await bench.service.get(made.name)
    assert now.progress is not None
    assert (now.revision, now.progress.completed) == (seen.revision, 3)
    assert (await bench.service.cancel(made.name, f'"{seen.revision}"')).state is EvaluationState.CANCELLING
    with pytest.raises(Aborted):
        await bench.service.cancel(made.name, f'"{seen.revision}"')


async def test_a_lost_attempt_is_queued_again(bench: Bench) -> None:
    await bench.create()
    await bench.claim()
    await bench.queue.release_worker("w", "2")
    await bench.claim()
    assert await bench.states() == ["QUEUED", "RUNNING", "QUEUED", "RUNNING"]


async def test_a_lost_attempt_of_an_evaluation_that_is_being_cancelled_ends_it(bench: Bench) -> None:
    made = await bench.create()
    await bench.claim()
    await bench.service.cancel(made.name, "")
    await bench.queue.release_worker("w", "2")
    assert (await bench.service.get(made.name)).state is EvaluationState.CANCELLED
    assert await bench.queue.claim("w@2", [TaskKind.EVALUATE], 0.0) is None


async def test_answers_of_a_lost_attempt_are_given_to_the_next_and_go_with_the_end(bench: Bench) -> None:
    made = await bench.create()
    task, spec = await bench.claim()
    assert list(spec.evaluate.checkpoint_files) == []
    for step, path in ((64, "a"), (130, "b"), (64, "again")):
        files = [task_pb2.BlobFile(path=path, sha256="f" * 64, size_bytes=step)]
        await bench.queue.commit_checkpoint(task.task_id, task.epoch, step, files, {})
    await bench.queue.release_worker("w", "2")
    task, spec = await bench.claim()
    kept = [(file.path, file.size_bytes) for file in spec.evaluate.checkpoint_files]
    assert kept == [("a", 64), ("b", 130)]
    await bench.queue.finish(task.task_id, task.epoch, Outcome(cancelled=True))
    async with bench.database.reading() as connection:
        assert (await bench.service.find(connection, made.name))[1] == []


async def test_a_success_that_crosses_a_cancel_is_kept(bench: Bench) -> None:
    made = await bench.create()
    task, _ = await bench.claim()
    await bench.service.cancel(made.name, "")
    blob = await bench.blobs.put_bytes(bytes(8))
    outcome = task_pb2.EvaluateResult(predictions=task_pb2.BlobFile(sha256=blob.digest))
    await bench.queue.finish(task.task_id, task.epoch, Outcome(result=task_pb2.TaskResult(evaluate=outcome)))
    assert (await bench.service.get(made.name)).state is EvaluationState.SUCCEEDED


async def test_a_result_whose_predictions_are_no_predictions_changes_nothing(bench: Bench) -> None:
    made = await bench.create()
    task, _ = await bench.claim()
    blob = await bench.blobs.put_bytes(b'{"row": 0}\n{"no_such_field": 1}\n')
    for num_records in (0, 2, 3, 4000, -1):
        outcome = task_pb2.EvaluateResult(
            num_records=num_records, predictions=task_pb2.BlobFile(sha256=blob.digest)
        )
        with pytest.raises(InvalidArgument, match=f"must be a file of {num_records} rows"):
            await bench.queue.finish(
                task.task_id, task.epoch, Outcome(result=task_pb2.TaskResult(evaluate=outcome))
            )
    assert (await bench.service.get(made.name)).state is EvaluationState.RUNNING


async def test_an_empty_split_is_refused_with_what_there_is(bench: Bench) -> None:
    with pytest.raises(FailedPrecondition, match=r"no record in the VALIDATION split.*'TEST': 3"):
        await bench.create(split=Split.VALIDATION)


async def test_create_below_the_floor_of_the_disk_is_refused(bench: Bench, tmp_path: Path) -> None:
    bench.database.disk = Disk(tmp_path, 1 << 60)
    with pytest.raises(ResourceExhausted, match="must stay free") as caught:
        await bench.create()
    assert caught.value.reason == Reason.DISK_FULL
