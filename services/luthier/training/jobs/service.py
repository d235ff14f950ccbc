"""What can be done with fine-tuning jobs."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Protocol

from sqlalchemy.ext.asyncio import AsyncConnection

from luthier.errors import Aborted, AlreadyExists, FieldViolation, Reason, ResourceExhausted
from luthier.runtime.names import check_id, new_id, project_of, same_project
from luthier.runtime.paging import PageTokens
from luthier.storage.database import Database
from luthier.training.jobs import repository
from luthier.training.jobs.base_models import Models
from luthier.training.jobs.counting import survey_elsewhere
from luthier.training.jobs.domain import Checkpoint, Job, JobState, MetricPoint, Plan
from luthier.training.jobs.planning import (
    Lengths,
    RenderingView,
    batch_settings,
    check_counts,
    make_plan,
    require_usable,
)
from luthier.training.jobs.settings import JobRequest, JobSettings, resolve, wrong_fields
from luthier.training.names import MODEL, RENDERING
from luthier.work.events import Entry, Event, StateChanged
from luthier.work.listing import ListRequest, list_page
from luthier.work.log import EventLog
from luthier.work.tasks import NewTask, Task, TaskKind

MAX_PLANS = 8
"""Plans that are counted or wait for it; more are refused."""
_PLAN_RETRY_SECONDS = 2.0
FILTERS = ("state", "labels", "base_model", "rendering")


class Renderings(Protocol):
    """Where jobs find their rows."""

    async def get(self, name: str) -> RenderingView:
        """Return a rendering. Raises NotFound, and Unavailable when its service is away."""
        ...

    async def lengths(self, name: str) -> Lengths:
        """Return the row lengths of a READY rendering. Raises as `get`."""
        ...


class Tasks(Protocol):
    """Where work for workers is queued."""

    async def enqueue(self, connection: AsyncConnection, new: NewTask) -> Task:
        """Queue a task in the caller's transaction."""
        ...

    async def request_cancel(self, connection: AsyncConnection, subject: str) -> None:
        """Stop a task: at once when it is queued, by its worker when it is leased."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedJob:
    """A job that nothing known in an instant speaks against: all settings, and what it builds on.

    `context_length` is the base model's, in tokens; 0 when it does not say.
    """

    settings: JobSettings
    rendering: RenderingView
    base_model_digest: str
    context_length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedJob:
    """A checked job and what it would do."""

    checked: CheckedJob
    plan: Plan


def _now() -> datetime:
    return datetime.now(UTC)


class JobService:
    """Use cases of jobs. A parent's project is checked by the caller."""

    def __init__(
        self,
        database: Database,
        log: EventLog,
        tasks: Tasks,
        models: Models,
        renderings: Renderings,
        clock: Callable[[], datetime] = _now,
    ) -> None:
        self._database = database
        self._log = log
        self._tasks = tasks
        self._models = models
        self._renderings = renderings
        self._clock = clock
        self._counting = asyncio.Semaphore(1)
        self._num_plans = 0
        self._jobs = repository.jobs()
        self._checkpoints = repository.Checkpoints()
        self._metrics = repository.Metrics()

    async def check(self, parent: str, request: JobRequest) -> CheckedJob:
        """Check a job by what is known of its base model and its rendering, without looking at rows.

        Raises:
            InvalidArgument: names every field that is wrong; CROSS_PROJECT_REFERENCE; SEQUENCE_TOO_LONG.
            NotFound: the model or the rendering does not exist.
            FailedPrecondition: one of them is not READY, they do not fit, or NO_SUPERVISED_TOKENS.
            Unavailable: the Data service is away.
        """
        _check_references(parent, request)
        settings = resolve(request)
        async with self._database.reading() as connection:
            base = await self._models.find_base(connection, request.base_model)
        rendering = await self._renderings.get(request.rendering)
        require_usable(rendering, request.base_model, base.tokenizer_digest)
        check_counts(settings, rendering, base.context_length)
        return CheckedJob(
            settings=settings,
            rendering=rendering,
            base_model_digest=base.digest,
            context_length=base.context_length,
        )

    async def plan(self, parent: str, request: JobRequest) -> PlannedJob:
        """Say what a job would do, having looked at the length of every row. Raises as `check`.

        Takes some 4 s for each pass over a million rows, in another process; one plan is counted at a time.
        More than `MAX_PLANS` at once are refused: ResourceExhausted OVERLOADED.
        """
        checked = await self.check(parent, request)
        batches = batch_settings(checked.settings.hyperparameters)
        if self._num_plans >= MAX_PLANS:
            raise ResourceExhausted(
                f"{self._num_plans} plans are being counted, one after the other; call again later",
                reason=Reason.OVERLOADED,
                retry_after_seconds=_PLAN_RETRY_SECONDS,
            )
        self._num_plans += 1
        try:
            async with self._counting:
                lengths = await self._renderings.lengths(request.rendering)
                found = await survey_elsewhere(lengths.train, lengths.validation, batches)
        finally:
            self._num_plans -= 1
        plan = make_plan(checked.settings, checked.rendering, found, checked.context_length)
        return PlannedJob(checked=checked, plan=plan)

    def draft(self, parent: str, job_id: str, request: JobRequest, checked: CheckedJob) -> Job:
        """Return the job as it would be created; an empty job_id leaves the name empty."""
        now = self._clock()
        return Job(
            name=f"{parent}/fineTuningJobs/{job_id}" if job_id else "",
            uid=str(uuid.uuid4()),
            state=JobState.QUEUED,
            labels=dict(request.labels),
            create_time=now,
            update_time=now,
            revision=1,
            display_name=request.display_name,
            base_model=request.base_model,
            rendering=request.rendering,
            base_model_digest=checked.base_model_digest,
            rendering_digest=checked.rendering.digest,
            lora=checked.settings.lora,
            hyperparameters=checked.settings.hyperparameters,
            checkpoint_interval_steps=checked.settings.checkpoint_interval_steps,
            validation_interval_steps=checked.settings.validation_interval_steps,
            max_checkpoints=checked.settings.max_checkpoints,
            tuned_model_id=request.tuned_model_id or job_id,
            taught=checked.rendering.taught,
        )

    async def create(self, parent: str, job_id: str, request: JobRequest) -> Job:
        """Queue a job; its worker looks at the rows while it is PREPARING.

        Raises as `check`, AlreadyExists when a job or the tuned model's name is taken, ResourceExhausted DISK_FULL.
        """
        chosen = check_id(job_id, field="fine_tuning_job_id") if job_id else new_id("job")
        self._database.disk.require_room()
        job = self.draft(parent, chosen, request, await self.check(parent, request))
        task = NewTask(
            kind=TaskKind.TRAIN,
            subject=job.name,
            project=project_of(parent),
            resources=(request.rendering,),
        )
        tuned_model = f"{parent}/models/{job.tuned_model_id}"
        if job.taught is not None:
            # Before the transaction, and before the job that needs it: a blob that nobody needs is no harm.
            await self._models.keep_template(job.taught)
        async with self._database.transaction() as connection:
            await self._jobs.insert(connection, job)
            if await self._models.exists(connection, tuned_model):
                raise AlreadyExists(
                    f"tuned_model_id must be new, {tuned_model} exists", metadata={"name": tuned_model}
                )
            queued = Entry(payload=StateChanged(state=job.state))
            await self._log.append(connection, job.name, [queued])
            await self._tasks.enqueue(connection, task)
        return job

    async def get(self, name: str) -> Job:
        """Return a job. Raises NotFound."""
        async with self._database.reading() as connection:
            return await self._jobs.get(connection, name)

    async def list_page(self, request: ListRequest, tokens: PageTokens) -> tuple[tuple[Job, ...], str]:
        """Return a page of a project's jobs and the next page's token. Raises InvalidArgument."""
        return await list_page(self._database, self._jobs, tokens, request, filters=FILTERS)

    async def cancel(self, name: str, etag: str) -> Job:
        """Ask a job to stop; one that has ended or is stopping stays as it is. Raises NotFound, Aborted."""
        async with self._database.transaction(makes_room=True) as connection:
            job = await self._jobs.get(connection, name)
            if etag and etag != job.etag:
                raise Aborted(
                    f"etag must be {job.etag} as {name} stands now, got {etag}; read it again",
                    metadata={"name": name, "etag": job.etag},
                )
            if job.final or job.state is JobState.CANCELLING:
                return job
            await self._tasks.request_cancel(connection, name)
            job = await self._jobs.get(connection, name)
            if job.final:
                return job
            job = await self._jobs.update(connection, job.moved(JobState.CANCELLING, self._clock()))
            await self._log.append(connection, name, [Entry(payload=StateChanged(state=job.state))])
        return job

    async def events(self, name: str, start_sequence: int, limit: int) -> Sequence[Event]:
        """Return at most `limit` events of a job from a number on. Raises NotFound."""
        await self.get(name)
        async with self._database.reading() as connection:
            return await self._log.read(connection, name, start_sequence, limit)

    async def metrics(self, name: str, after_step: int, limit: int) -> Sequence[MetricPoint]:
        """Return at most `limit` metric points of a job after a step. Raises NotFound."""
        await self.get(name)
        async with self._database.reading() as connection:
            return await self._metrics.after(connection, name, after_step, limit)

    async def checkpoint(self, name: str) -> Checkpoint:
        """Return a checkpoint. Raises NotFound."""
        async with self._database.reading() as connection:
            return await self._checkpoints.get(connection, name)

    async def checkpoints(self, name: str, after_step: int, limit: int) -> Sequence[Checkpoint]:
        """Return at most `limit` checkpoints of a job after a step. Raises NotFound."""
        await self.get(name)
        async with self._database.reading() as connection:
            return await self._checkpoints.after(connection, name, after_step, limit)


def _check_references(parent: str, request: JobRequest) -> None:
    missing = [
        FieldViolation(
            field=f"fine_tuning_job.{field}",
            description=f"{field} must name a {kind} of {parent}, got none",
            reason=Reason.FIELD_REQUIRED,
        )
        for field, kind, value in (
            ("base_model", "base model", request.base_model),
            ("rendering", "rendering", request.rendering),
        )
        if not value
    ]
    if missing:
        raise wrong_fields(*missing)
    MODEL.parse(request.base_model, field="fine_tuning_job.base_model")
    RENDERING.parse(request.rendering, field="fine_tuning_job.rendering")
    same_project(parent, request.base_model, "fine_tuning_job.base_model")
    same_project(parent, request.rendering, "fine_tuning_job.rendering")
