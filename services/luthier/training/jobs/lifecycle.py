"""What happens to a job as its task goes on. Every method runs in the transaction that changes the task."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from sqlalchemy.ext.asyncio import AsyncConnection

from luthier.errors import Failure
from luthier.storage.blobs import BlobStore
from luthier.storage.pages import parent_of
from luthier.training.files import files_digest
from luthier.training.jobs import repository
from luthier.training.jobs.base_models import BaseModel, Models
from luthier.training.jobs.domain import Checkpoint, CheckpointFile, Job, JobState, Progress, RunRecord
from luthier.training.jobs.released import ReleasedBlobs
from luthier.work.events import CheckpointCommitted, Entry, Logged, Measured, Progressed, StateChanged
from luthier.work.log import EventLog

TRAINING_PHASE = "training"
"""Phase of a worker's progress from its first step on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToTrain:
    """What a worker needs: the job, its base model, and the checkpoint to resume from, if any."""

    job: Job
    base_model: BaseModel
    checkpoint: Checkpoint | None


def _now() -> datetime:
    return datetime.now(UTC)


class JobLifecycle:
    """Moves jobs through their states as their tasks report."""

    def __init__(
        self,
        log: EventLog,
        models: Models,
        blobs: BlobStore,
        released: ReleasedBlobs,
        clock: Callable[[], datetime] = _now,
    ) -> None:
        self._log = log
        self._models = models
        self._blobs = blobs
        self._released = released
        self._clock = clock
        self._jobs = repository.jobs()
        self._checkpoints = repository.Checkpoints()
        self._metrics = repository.Metrics()

    async def to_train(self, connection: AsyncConnection, name: str) -> ToTrain:
        """Return what a worker needs, as the transaction sees it."""
        job = await self._jobs.get(connection, name)
        return ToTrain(
            job=job,
            base_model=await self._models.find_base(connection, job.base_model),
            checkpoint=await self._checkpoints.latest(connection, name),
        )

    async def started(self, connection: AsyncConnection, name: str, attempt: int) -> None:
        """An attempt began."""
        job = await self._jobs.get(connection, name)
        await self._move(connection, replace(job, num_attempts=attempt), JobState.PREPARING)

    async def reported(
        self,
        connection: AsyncConnection,
        name: str,
        attempt: int,
        entries: Sequence[Entry],
        run_record: RunRecord | None,
    ) -> None:
        """A worker reported; the entries stand in the log already."""
        job = await self._jobs.get(connection, name)
        is_told_where = run_record is not None and run_record != job.run_record
        begun = False
        for entry in entries:
            match entry.payload:
                case Measured(values=values):
                    await self._metrics.record(connection, name, entry.step, attempt, values)
                    job = replace(job, latest_metrics={**job.latest_metrics, **values})
                    begun = True
                case Progressed() as made:
                    begun = begun or made.phase == TRAINING_PHASE
                    job = replace(job, progress=_progress(made))
                case _:
                    pass
        job = replace(job, run_record=run_record or job.run_record)
        if begun and job.state is JobState.PREPARING:
            await self._move(connection, job, JobState.RUNNING)
        elif is_told_where:
            await self._jobs.update(connection, job)
        else:
            await self._jobs.report(connection, job)

    async def checkpointed(
        self,
        connection: AsyncConnection,
        name: str,
        attempt: int,
        step: int,
        files: Sequence[CheckpointFile],
        metrics: Mapping[str, float],
    ) -> str:
        """Store a checkpoint and return its name; older ones go as the job says.

        The same step again changes nothing. Raises NotFound for a file whose blob is not there, seen by the same
        transaction.
        """
        checkpoint = Checkpoint(
            name=f"{name}/checkpoints/step-{step}",
            uid=str(uuid.uuid4()),
            job=name,
            step=step,
            attempt=attempt,
            metrics=dict(metrics),
            files=tuple(sorted(files, key=lambda file: file.path)),
            digest=files_digest({file.path: file.sha256 for file in files}),
            size_bytes=sum(file.size_bytes for file in files),
            create_time=self._clock(),
        )
        for file in files:
            await self._blobs.size(file.sha256)
        if await self._checkpoints.add(connection, checkpoint):
            committed = CheckpointCommitted(checkpoint=checkpoint.name)
            await self._log.append(connection, name, [Entry(payload=committed, step=step, attempt=attempt)])
            await self._drop_older(connection, name)
        return checkpoint.name

    async def _drop_older(self, connection: AsyncConnection, name: str) -> None:
        job = await self._jobs.get(connection, name)
        if job.max_checkpoints:
            dropped = await self._checkpoints.drop_older(connection, name, job.max_checkpoints)
            digests = [file.sha256 for point in dropped for file in point.files]
            await self._released.release(connection, digests)

    async def succeeded(
        self, connection: AsyncConnection, name: str, step: int, files: Mapping[str, tuple[str, int]]
    ) -> None:
        """All steps are made: the tuned model is there in the same instant as the job's end."""
        job = await self._jobs.get(connection, name)
        wanted = f"{parent_of(name)}/models/{job.tuned_model_id}"
        tuned_model = await self._models.add_adapter(
            connection, wanted, job.base_model, name, step, files, job.taught
        )
        if tuned_model != wanted:
            text = f"{wanted} was taken in the meantime, the tuned model is {tuned_model}"
            line = Entry(payload=Logged(severity="WARNING", text=text), attempt=job.num_attempts)
            await self._log.append(connection, name, [line])
        await self._move(connection, replace(job, tuned_model=tuned_model), JobState.SUCCEEDED)

    async def failed(self, connection: AsyncConnection, name: str, failure: Failure) -> None:
        """The job failed for good."""
        job = await self._jobs.get(connection, name)
        await self._move(connection, replace(job, failure=failure), JobState.FAILED)

    async def cancelled(self, connection: AsyncConnection, name: str) -> None:
        """The job stopped on request, or was never begun."""
        await self._move(connection, await self._jobs.get(connection, name), JobState.CANCELLED)

    async def lost(self, connection: AsyncConnection, name: str) -> None:
        """The attempt was lost and the job is queued again."""
        job = await self._jobs.get(connection, name)
        await self._move(
            connection, job, JobState.QUEUED, f"attempt {job.num_attempts} was lost, another follows"
        )

    async def _move(self, connection: AsyncConnection, job: Job, state: JobState, message: str = "") -> None:
        moved = await self._jobs.update(connection, job.moved(state, self._clock()))
        change = StateChanged(state=moved.state, message=message, failure=moved.failure, final=moved.final)
        entry = Entry(payload=change, attempt=moved.num_attempts)
        await self._log.append(connection, moved.name, [entry])


def _progress(made: Progressed) -> Progress:
    return Progress(
        phase=made.phase,
        completed=made.completed,
        total=made.total,
        unit=made.unit,
        remaining_seconds=made.remaining_seconds,
    )
