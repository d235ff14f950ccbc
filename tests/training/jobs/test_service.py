"""Jobs: what is refused before they exist, and their life from creation to an end."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from sqlalchemy import select
from tests.training.conftest import adapter_files, stored
from tests.work.checkpoints import checkpoint_of

from luthier.errors import (
    Aborted,
    AlreadyExists,
    FailedPrecondition,
    Failure,
    InvalidArgument,
    NotFound,
    Reason,
    ResourceExhausted,
)
from luthier.errors.status import status_to_failure
from luthier.storage.disk import Disk
from luthier.v1.event_pb2 import Event, MetricValues, Progress
from luthier.v1.fine_tuning_job_pb2 import FineTuningJob, Hyperparameters
from luthier.v1.model_pb2 import Model
from luthier.v1.reference_pb2 import Reference
from luthier.work.schema import events
from luthier.work.tasks import Outcome, TaskKind
from luthier.worker.v1 import task_pb2

JOB = "projects/default/fineTuningJobs/one"


async def test_create_queues_a_job_with_resolved_settings(bench: Any) -> None:
    job = await bench.create("one")
    assert await bench.job(JOB) == job
    assert job.state == FineTuningJob.STATE_QUEUED
    assert job.tuned_model_id == "one"
    private = (await bench.jobs.family.read(JOB)).private
    assert (private.base_model_digest, private.rendering_digest) == ("d" * 64, "r" * 64)
    assert await bench.states(JOB) == ["QUEUED"]
    task, spec = await bench.claim()
    assert (task.subject, task.resources) == (JOB, (bench.RENDERING,))
    assert spec.train.job.lora.rank == 16
    assert [file.path for file in spec.train.base_model_files] == ["model.safetensors", "tokenizer.json"]
    assert not spec.train.checkpoint_files


@pytest.mark.parametrize(
    ("change", "kind", "reason", "message"),
    [
        (
            {"base_model": "projects/default/models/unknown"},
            NotFound,
            Reason.RESOURCE_NOT_FOUND,
            "projects/default/models/unknown does not exist",
        ),
        (
            {"rendering": "projects/default/renderings/unknown"},
            NotFound,
            Reason.RESOURCE_NOT_FOUND,
            "projects/default/renderings/unknown does not exist",
        ),
        (
            {"base_model": "tiny"},
            InvalidArgument,
            Reason.INVALID_FIELD,
            "must be projects/{project}/models/{model}",
        ),
        (
            {"base_model": "", "rendering": ""},
            InvalidArgument,
            Reason.FIELD_REQUIRED,
            "fine_tuning_job.base_model: must name a base model, or start_from what to go on with, got nothing; "
            "fine_tuning_job.rendering: must name a rendering, got nothing",
        ),
    ],
)
async def test_create_refuses_references_that_lead_nowhere(
    bench: Any, change: dict[str, str], kind: type[Exception], reason: Reason, message: str
) -> None:
    with pytest.raises(kind) as caught:
        await bench.create("one", **change)
    assert getattr(caught.value, "reason", "") == reason
    assert message in str(caught.value)
    with pytest.raises(NotFound):
        await bench.job(JOB)


async def test_create_refuses_a_model_that_is_not_ready_or_no_base(bench: Any) -> None:
    await bench.add_model("projects/default/models/late", state=Model.STATE_REGISTERING)
    with pytest.raises(FailedPrecondition, match="models/late must be READY, it is REGISTERING"):
        await bench.create("one", base_model="projects/default/models/late")
    await bench.add_model("projects/default/models/adapter", kind=Model.KIND_ADAPTER, base_model=bench.MODEL)
    with pytest.raises(InvalidArgument, match="must be a model with all its weights, got"):
        await bench.create("one", base_model="projects/default/models/adapter")


async def test_create_refuses_a_rendering_of_another_tokenizer(bench: Any) -> None:
    bench.add_rendering(tokenizer_digest="x" * 64)
    with pytest.raises(FailedPrecondition, match="create a rendering for this model") as caught:
        await bench.create("one")
    assert caught.value.reason == Reason.WRONG_STATE


async def test_create_refuses_taken_names(bench: Any) -> None:
    await bench.create("one")
    with pytest.raises(AlreadyExists, match="fineTuningJobs/one exists already"):
        await bench.create("one", tuned_model_id="other")
    with pytest.raises(
        AlreadyExists, match="tuned_model_id must be new, projects/default/models/tiny exists"
    ):
        await bench.create("two", tuned_model_id="tiny")
    with pytest.raises(NotFound):
        await bench.job("projects/default/fineTuningJobs/two")
    async with bench.database.reading() as connection:
        kept = [row.event for row in await connection.execute(select(events))]
    assert len(kept) == 1, "of the first job"
    await bench.elsewhere.sweep()
    assert bench.keeper.holders() == [(bench.RENDERING, "projects/default/fineTuningJobs/one")]


async def test_plan_creates_nothing(bench: Any) -> None:
    plan = await bench.plan(hyperparameters=Hyperparameters(batch_rows=4, num_epochs=2))
    assert (plan.num_steps, plan.num_steps_per_epoch) == (10, 5)
    assert plan.num_validation_rows == 5
    assert (plan.resolved_job.lora.rank, plan.resolved_job.name) == (16, "")
    assert plan.resolved_job.state == FineTuningJob.STATE_UNSPECIFIED
    assert await bench.queue.claim("worker@1", [TaskKind.TRAIN], 0.0) is None


async def report(bench: Any, task: Any, number: int, event: Event) -> None:
    await bench.queue.report(task.task_id, task.epoch, [(number, event)], None)


async def test_a_job_runs_and_succeeds_with_its_model_in_one_transaction(bench: Any) -> None:
    await bench.create("one", tuned_model_id="tuned")
    task, _ = await bench.claim()
    assert (await bench.job(JOB)).state == FineTuningJob.STATE_PREPARING
    progress = Progress(phase="training", completed=0, total=1, unit="steps")
    await report(bench, task, 1, Event(progress=progress))
    assert (await bench.job(JOB)).state == FineTuningJob.STATE_RUNNING
    await report(bench, task, 2, Event(step=1, metrics=MetricValues(values={"train_loss": 2.5})))
    files = await adapter_files(bench)
    await bench.queue.commit_checkpoint(checkpoint_of(task, 1, files, {"train_loss": 2.5}))
    result = task_pb2.TaskResult(train=task_pb2.TrainResult(files=files, step=1))
    await bench.queue.finish(task.task_id, task.epoch, Outcome(result=result))

    job = await bench.job(JOB)
    assert job.state == FineTuningJob.STATE_SUCCEEDED
    assert job.tuned_model == "projects/default/models/tuned"
    assert job.latest_metrics == {"train_loss": 2.5}
    assert job.HasField("end_time")
    model = await bench.model(job.tuned_model)
    assert (model.state, model.kind) == (Model.STATE_READY, Model.KIND_ADAPTER)
    assert (model.base_model, model.fine_tuning_job, model.step) == (bench.MODEL, JOB, 1)
    base, rendering = job.references[:2]
    assert list(job.references[2:]) == [Reference(name=model.name, uid=model.uid, digest=model.digest)]
    assert list(model.references) == [base, Reference(name=JOB, uid=job.uid), rendering]
    assert rendering.name == bench.RENDERING
    found = (await bench.models.ready(model.name)).private.files
    tokenizer = (await bench.models.ready(bench.MODEL)).private.files[1]
    assert [(file.path, file.sha256) for file in found] == [
        *((file.path, file.sha256) for file in files),
        ("tokenizer.json", tokenizer.sha256),
    ]
    assert await bench.states(JOB) == ["QUEUED", "PREPARING", "RUNNING", "SUCCEEDED"]
    assert await bench.states(job.tuned_model) == ["READY"]
    checkpoint = await bench.jobs.checkpoint(f"{JOB}/checkpoints/step-1")
    assert (checkpoint.step, checkpoint.attempt, checkpoint.size_bytes) == (1, 1, 15)


async def test_a_tuned_models_name_taken_meanwhile_costs_no_work(bench: Any) -> None:
    await bench.create("one")
    task, _ = await bench.claim()
    await bench.add_model("projects/default/models/one")
    result = task_pb2.TaskResult(train=task_pb2.TrainResult(files=await adapter_files(bench), step=1))
    await bench.queue.finish(task.task_id, task.epoch, Outcome(result=result))
    job = await bench.job(JOB)
    assert job.state == FineTuningJob.STATE_SUCCEEDED
    assert job.tuned_model.startswith("projects/default/models/one-")
    model = await bench.model(job.tuned_model)
    assert model.fine_tuning_job == JOB
    assert (job.references[2].name, job.references[2].uid) == (model.name, model.uid)


async def test_a_lost_attempt_is_followed_by_one_that_resumes_from_the_last_checkpoint(bench: Any) -> None:
    await bench.create("one")
    task, _ = await bench.claim()
    for step in (1, 2):
        file = await stored(bench, f"step {step}")
        await bench.queue.commit_checkpoint(checkpoint_of(task, step, [file]))
    await bench.queue.release_worker("worker", "2")
    assert (await bench.job(JOB)).state == FineTuningJob.STATE_QUEUED
    again, spec = await bench.claim()
    assert again.attempt == 2
    assert spec.train.checkpoint_step == 2
    assert [file.sha256 for file in spec.train.checkpoint_files] == [(await stored(bench, "step 2")).sha256]
    assert await bench.states(JOB) == ["QUEUED", "PREPARING", "QUEUED", "PREPARING"]
    assert (await bench.job(JOB)).num_attempts == 2


async def test_a_job_that_cannot_be_handed_out_fails_by_name(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    await bench.create("one")
    base = bench.models.base

    async def gone(connection: Any, uid: str) -> Any:
        raise NotFound(f"{uid} does not exist")

    monkeypatch.setattr(bench.models, "base", gone)
    assert await bench.queue.claim("worker@1", [TaskKind.TRAIN], 0.0) is None
    job = await bench.job(JOB)
    assert job.state == FineTuningJob.STATE_FAILED
    assert status_to_failure(job.error).reason == "RESOURCE_NOT_FOUND"
    assert job.num_attempts == 0
    monkeypatch.setattr(bench.models, "base", base)
    assert await bench.queue.claim("worker@1", [TaskKind.TRAIN], 0.0) is None, "it is not handed out again"


async def test_metrics_show_the_last_attempt_of_a_step(bench: Any) -> None:
    await bench.create("one")
    first, _ = await bench.claim()
    for step in (1, 2):
        values = {"train_loss": float(step), "only_first": 0.0}
        await report(bench, first, step, Event(step=step, metrics=MetricValues(values=values)))
    await bench.queue.release_worker("worker", "2")
    second, _ = await bench.claim()
    for number, values in enumerate(({"train_loss": 20.0}, {"validation_loss": 5.0}), start=1):
        await report(bench, second, number, Event(step=2, metrics=MetricValues(values=values)))
    uid = (await bench.job(JOB)).uid
    points = await bench.jobs.metrics(uid, 0, 10)
    assert [(point.step, point.attempt, dict(point.values)) for point in points] == [
        (1, 1, {"train_loss": 1.0, "only_first": 0.0}),
        (2, 2, {"train_loss": 20.0, "validation_loss": 5.0}),
    ]
    assert [point.step for point in await bench.jobs.metrics(uid, 1, 10)] == [2]


async def test_create_looks_at_no_row(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(name: str) -> None:
        pytest.fail(f"the rows of {name} were read")

    monkeypatch.setattr(bench.renderings, "lengths", refuse)
    await bench.create("one")
    asked = Hyperparameters(micro_batch_tokens=9)
    with pytest.raises(
        InvalidArgument, match="micro_batch_tokens must be at least 10, the longest row, got 9"
    ):
        await bench.create("two", hyperparameters=asked)


async def test_cancel_ends_a_queued_job_at_once(bench: Any) -> None:
    await bench.create("one")
    job = await bench.cancel(JOB, "")
    assert job.state == FineTuningJob.STATE_CANCELLED
    assert await bench.cancel(JOB, "") == job
    assert await bench.states(JOB) == ["QUEUED", "CANCELLED"]


async def test_cancel_waits_for_the_worker_of_a_running_job(bench: Any) -> None:
    await bench.create("one")
    task, _ = await bench.claim()
    assert (await bench.cancel(JOB, "")).state == FineTuningJob.STATE_CANCELLING
    assert (await bench.cancel(JOB, "")).state == FineTuningJob.STATE_CANCELLING
    assert (await bench.queue.heartbeat(task.task_id, task.epoch)).cancel_requested
    await bench.queue.finish(task.task_id, task.epoch, Outcome(cancelled=True))
    assert await bench.states(JOB) == ["QUEUED", "PREPARING", "CANCELLING", "CANCELLED"]


async def test_cancel_refuses_an_old_etag(bench: Any) -> None:
    job = await bench.create("one")
    await bench.claim()
    with pytest.raises(Aborted, match=r'has the etag "2", got "1"') as caught:
        await bench.cancel(JOB, job.etag)
    assert caught.value.reason == Reason.ETAG_MISMATCH
    assert (await bench.job(JOB)).state == FineTuningJob.STATE_PREPARING


async def test_the_etag_outlives_progress_and_metrics_but_no_other_change(bench: Any) -> None:
    await bench.create("one")
    task, _ = await bench.claim()
    await report(bench, task, 1, Event(step=1, metrics=MetricValues(values={"train_loss": 3.0})))
    seen = await bench.job(JOB)
    assert seen.state == FineTuningJob.STATE_RUNNING
    for step in range(2, 6):
        progress = Progress(phase="training", completed=step, total=9, unit="steps", remaining_seconds=1.0)
        await report(bench, task, 2 * step, Event(progress=progress))
        await report(
            bench, task, 2 * step + 1, Event(step=step, metrics=MetricValues(values={"train_loss": 1.0}))
        )
    now = await bench.job(JOB)
    assert (now.etag, now.progress.completed, now.latest_metrics["train_loss"]) == (seen.etag, 5, 1.0)
    assert now.update_time.ToNanoseconds() > seen.update_time.ToNanoseconds()
    assert (await bench.cancel(JOB, seen.etag)).state == FineTuningJob.STATE_CANCELLING
    with pytest.raises(Aborted):
        await bench.cancel(JOB, seen.etag)


async def test_a_failed_job_says_why(bench: Any) -> None:
    await bench.create("one")
    task, _ = await bench.claim()
    failure = Failure(code="FAILED_PRECONDITION", reason=Reason.LOSS_NOT_FINITE, message="step 3")
    await bench.queue.finish(task.task_id, task.epoch, Outcome(failure=failure))
    job = await bench.job(JOB)
    assert (job.state, status_to_failure(job.error)) == (FineTuningJob.STATE_FAILED, failure)
    with pytest.raises(NotFound):
        await bench.model("projects/default/models/one")


async def test_a_cancelled_job_may_still_end_well_or_badly(bench: Any) -> None:
    """The worker may have been done before it heard."""
    files = await adapter_files(bench)
    for name, outcome, state in (
        (
            "one",
            Outcome(result=task_pb2.TaskResult(train=task_pb2.TrainResult(files=files, step=1))),
            FineTuningJob.STATE_SUCCEEDED,
        ),
        (
            "two",
            Outcome(failure=Failure(code="INTERNAL", reason="INTERNAL", message="")),
            FineTuningJob.STATE_FAILED,
        ),
    ):
        job = await bench.create(name)
        task, _ = await bench.claim()
        await bench.cancel(job.name, "")
        await bench.queue.finish(task.task_id, task.epoch, outcome)
        assert (await bench.job(job.name)).state == state


async def test_events_are_read_from_any_number_on(bench: Any) -> None:
    await bench.create("one")
    await bench.claim()
    uid = (await bench.job(JOB)).uid
    whole = await bench.jobs.family.events(uid, 0, 100)
    assert [event.sequence for event in whole] == [1, 2, 3]
    assert await bench.jobs.family.events(uid, 1, 1) == [whole[1]]


async def test_plan_names_records_that_teach_nothing(bench: Any) -> None:
    bench.know(bench.add_rendering(), (), ())
    with pytest.raises(FailedPrecondition) as caught:
        await bench.plan()
    assert caught.value.reason == Reason.NO_SUPERVISED_TOKENS


async def test_create_below_the_floor_of_the_disk_is_refused_and_cancel_is_not(bench: Any) -> None:
    made = await bench.create("one")
    bench.database.disk = Disk(bench.folder, 1 << 60)
    with pytest.raises(ResourceExhausted, match="must stay free") as caught:
        await bench.create("two")
    assert caught.value.reason == Reason.DISK_FULL
    with pytest.raises(NotFound):
        await bench.job(f"{bench.PARENT}/fineTuningJobs/two")
    assert (await bench.cancel(made.name, "")).state == FineTuningJob.STATE_CANCELLED


async def test_no_attempt_begins_below_the_floor_of_the_disk(bench: Any) -> None:
    await bench.create("one")
    room, bench.database.disk = bench.database.disk, Disk(bench.folder, 1 << 60)
    assert await bench.queue.claim("w@1", [TaskKind.TRAIN], 0.1) is None
    waiting = asyncio.create_task(bench.queue.claim("w@1", [TaskKind.TRAIN], 20.0))
    await asyncio.sleep(0.1)
    bench.database.disk = room
    async with asyncio.timeout(10):
        claimed = await waiting
    assert claimed is not None


async def test_an_attempt_given_back_by_a_full_disk_is_not_counted(bench: Any) -> None:
    await bench.create("one")
    for _ in range(7):
        task, _ = await bench.claim()
        failure = Failure(code="RESOURCE_EXHAUSTED", reason=Reason.DISK_FULL, message="the disk is full")
        await bench.queue.finish(task.task_id, task.epoch, Outcome(failure=failure))
        assert (await bench.job(JOB)).state == FineTuningJob.STATE_QUEUED
    task, _ = await bench.claim()
    assert (task.losses, task.attempt) == (0, 8)
