"""What happens to a job as its task goes on. Every method runs in the transaction that changes the task."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence

from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import status_pb2
from sqlalchemy.ext.asyncio import AsyncConnection

from luthier.errors import FailedPrecondition, Failure
from luthier.errors.status import failure_to_status
from luthier.runtime.digests import files_digest
from luthier.storage.blobs import BlobStore
from luthier.storage.stored import Stored
from luthier.stored.v1.training_pb2 import CheckpointPrivate, FineTuningJobPrivate
from luthier.training.jobs import repository
from luthier.training.jobs.base_models import Models
from luthier.training.jobs.methods import method_of
from luthier.training.jobs.repository import StoredCheckpoint
from luthier.training.jobs.reward_models import RewardModels
from luthier.training.jobs.rollouts import KeptRollouts
from luthier.training.jobs.rules import RESULT_LIMITS, State
from luthier.training.jobs.tuned import origin_of, tuned_model
from luthier.training.recipe_settings import selection_of
from luthier.training.recipes.course import Course
from luthier.v1.event_pb2 import CheckpointCommitted, Event
from luthier.v1.fine_tuning_job_pb2 import Checkpoint, FineTuningJob, RunRecord
from luthier.work.events import line
from luthier.work.families import Family, referred
from luthier.work.holds import Holds
from luthier.work.log import EventLog
from luthier.work.tasks import Task
from luthier.worker.v1 import task_pb2, worker_service_pb2

TRAINING_PHASE = "training"
"""Phase of a worker's progress from its first step on."""

StoredJob = Stored[FineTuningJob, FineTuningJobPrivate]


class TrainHandler:
    """Follows TRAIN tasks: moves jobs through their states and keeps what their workers bring."""

    result_limits = RESULT_LIMITS

    def __init__(
        self,
        family: Family[FineTuningJob, FineTuningJobPrivate],
        log: EventLog,
        models: Models,
        blobs: BlobStore,
        rollouts: KeptRollouts,
    ) -> None:
        self._family = family
        self._log = log
        self._models = models
        self._blobs = blobs
        self._rollouts = rollouts
        self._reward_models = RewardModels(models, family)
        self._jobs = repository.jobs()
        self._checkpoints = repository.Checkpoints()
        self._metrics = repository.Metrics()

    async def specify(self, connection: AsyncConnection, task: Task) -> task_pb2.Task:
        """Say what to train, from which checkpoint on, and what was drawn since."""
        job = await self._stored(connection, task)
        base = await self._models.base(connection, referred(job.message, job.message.base_model).uid)
        spec = task_pb2.TrainSpec(
            job=job.message,
            base_model_files=base.private.files,
            base_model_digest=base.message.digest,
            rendering_digest=job.private.rendering_digest,
            mixed_rendering_digests=job.private.mixed_rendering_digests,
            start_files=job.private.start_files,
            reward_models=await self._reward_models.of_task(connection, job.message),
        )
        checkpoint = await self._checkpoints.latest(connection, job.uid)
        if checkpoint is not None:
            spec.checkpoint_step = checkpoint.message.step
            spec.checkpoint_files.extend(checkpoint.private.files)
        spec.rollouts.extend(await self._rollouts.after(connection, job.uid, spec.checkpoint_step))
        return task_pb2.Task(train=spec)

    async def started(self, connection: AsyncConnection, task: Task) -> None:
        """A worker began: the job is PREPARING."""
        job = await self._stored(connection, task)
        changed = job.copy()
        changed.num_attempts = task.attempt
        _end_pause(changed)
        if not changed.HasField("start_time"):
            changed.start_time.GetCurrentTime()
        await self._move(connection, job, State.STATE_PREPARING, changed)

    async def reporting(self, connection: AsyncConnection, task: Task, events: Sequence[Event]) -> None:
        """Events are recorded as they come."""

    async def reported(
        self,
        connection: AsyncConnection,
        task: Task,
        events: Sequence[Event],
        run_record: RunRecord | None,
    ) -> None:
        """Keep metrics, progress and the run record; the first step makes the job RUNNING."""
        job = await self._stored(connection, task)
        changed = job.copy()
        has_begun = False
        for event in events:
            match event.WhichOneof("payload"):
                case "metrics":
                    values = event.metrics.values
                    await self._metrics.record(connection, job.uid, event.step, task.attempt, values)
                    changed.latest_metrics.update(values)
                    has_begun = True
                case "progress":
                    changed.progress.CopyFrom(event.progress)
                    has_begun = has_begun or event.progress.phase == TRAINING_PHASE
                case _:
                    pass
        if run_record is not None:
            changed.run_record.CopyFrom(run_record)
        if has_begun and changed.state == State.STATE_PREPARING:
            await self._move(connection, job, State.STATE_RUNNING, changed)
        elif changed.run_record != job.message.run_record:
            await self._jobs.update(connection, job, changed)
        else:
            await self._jobs.report(connection, job, changed)

    async def checkpointed(
        self,
        connection: AsyncConnection,
        task: Task,
        step: int,
        files: Sequence[task_pb2.BlobFile],
        metrics: Mapping[str, float],
    ) -> str:
        """Store a checkpoint and return its name; older ones go as the job says.

        The same step again changes nothing. Raises NotFound for a file whose blob is not there, seen by the same
        transaction.
        """
        job = await self._stored(connection, task)
        job = await self._judged(connection, job, step, metrics)
        checkpoint = Checkpoint(
            name=f"{task.subject}/checkpoints/step-{step}",
            uid=str(uuid.uuid4()),
            step=step,
            attempt=task.attempt,
            metrics=metrics,
            digest=files_digest({file.path: file.sha256 for file in files}),
            size_bytes=sum(file.size_bytes for file in files),
        )
        checkpoint.create_time.GetCurrentTime()
        for file in files:
            await self._blobs.size(file.sha256)
        private = CheckpointPrivate(files=sorted(files, key=lambda file: file.path))
        stored = StoredCheckpoint(message=checkpoint, private=private)
        if await self._checkpoints.add(connection, job.uid, stored):
            committed = CheckpointCommitted(checkpoint=checkpoint.name)
            event = Event(step=step, attempt=task.attempt, checkpoint=committed)
            await self._log.append(connection, task.uid, [event])
            await self._drop_older(connection, job)
        return checkpoint.name

    async def rolled_out(
        self,
        connection: AsyncConnection,
        task: Task,
        request: worker_service_pb2.CommitRolloutsRequest,
    ) -> None:
        """Keep what a step drew. Raises as `KeptRollouts.commit`, and FailedPrecondition for one of another method."""
        job = await self._stored(connection, task)
        if not job.message.HasField("reinforcement"):
            raise FailedPrecondition(
                f"{task.subject} must be of method reinforcement to have rollouts, it is of method "
                f"{method_of(job.message)}",
                metadata={"name": task.subject},
            )
        await self._rollouts.commit(connection, job.uid, task.attempt, request)

    async def _judged(
        self, connection: AsyncConnection, job: StoredJob, step: int, metrics: Mapping[str, float]
    ) -> StoredJob:
        """Return a job that knows which of its checkpoints is the best, now that there is one more."""
        selection, known = selection_of(job.message), job.message
        if selection is None or selection.metric not in metrics or step <= known.best_step:
            return job
        before = Course(step=step, best_step=known.best_step, best_value=job.private.best_value)
        after = selection.judged(before, metrics[selection.metric])
        if after.best_step != step:
            return job
        changed, private = job.copy(), job.copy_private()
        changed.best_step, private.best_value = step, after.best_value
        return await self._jobs.update(connection, job, changed, private)

    async def _drop_older(self, connection: AsyncConnection, job: StoredJob) -> None:
        if job.message.max_checkpoints:
            keep = job.message.max_checkpoints
            held = await Holds().held(connection, await self._checkpoints.uids(connection, job.uid))
            await self._checkpoints.drop_older(connection, job.uid, keep, held, job.message.best_step)

    async def succeeded(self, connection: AsyncConnection, task: Task, result: task_pb2.TaskResult) -> None:
        """The job SUCCEEDED: its tuned model is there, READY, in the same instant."""
        job = await self._stored(connection, task)
        step, files = await self._chosen(connection, job, result.train)
        wanted = tuned_model(job, step)
        changed = job.copy()
        tuned = await self._models.add_tuned(connection, wanted, origin_of(job), files)
        changed.tuned_model = tuned.message.name
        changed.references.add(name=tuned.message.name, uid=tuned.uid, digest=tuned.message.digest)
        if changed.tuned_model != wanted.name:
            text = f"{wanted.name} was taken in the meantime, the tuned model is {changed.tuned_model}"
            warning = line(text, "WARNING", attempt=changed.num_attempts)
            await self._log.append(connection, task.uid, [warning])
        await self._move(connection, job, State.STATE_SUCCEEDED, changed)

    async def _chosen(
        self, connection: AsyncConnection, job: StoredJob, result: task_pb2.TrainResult
    ) -> tuple[int, Sequence[task_pb2.BlobFile]]:
        """Return the step of the model and its files: those of the end, or of the best checkpoint."""
        best = job.message.best_step
        if not job.message.selection.use_best or best in (0, result.step):
            return result.step, result.files
        checkpoint = await self._checkpoints.at(connection, job.uid, best)
        return best, checkpoint.private.files

    async def failed(
        self,
        connection: AsyncConnection,
        task: Task,
        failure: Failure,
        result: task_pb2.TaskResult | None,
    ) -> None:
        """The job FAILED for good."""
        job = await self._stored(connection, task)
        changed = job.copy()
        changed.error.CopyFrom(failure_to_status(failure))
        await self._move(connection, job, State.STATE_FAILED, changed)

    async def cancelled(
        self, connection: AsyncConnection, task: Task, result: task_pb2.TaskResult | None
    ) -> None:
        """The job stopped on request, or was never begun."""
        job = await self._stored(connection, task)
        await self._move(connection, job, State.STATE_CANCELLED, job.copy())

    async def waits(self, connection: AsyncConnection, task: Task, why: status_pb2.Status | None) -> None:
        """No worker is there for the job, or one is again."""
        await self._family.show_waiting(connection, task.uid, why)

    async def lost(self, connection: AsyncConnection, task: Task) -> None:
        """The attempt was lost and the job is queued again."""
        job = await self._stored(connection, task)
        why = f"attempt {job.message.num_attempts} was lost, another follows"
        await self._move(connection, job, State.STATE_QUEUED, job.copy(), why)

    async def paused(self, connection: AsyncConnection, task: Task) -> None:
        """No worker has the job, and none is given it until it is resumed."""
        job = await self._stored(connection, task)
        changed = job.copy()
        # One that was resumed and not begun since has been paused all the time.
        _end_pause(changed)
        changed.pause_time.GetCurrentTime()
        await self._move(connection, job, State.STATE_PAUSED, changed)

    async def _stored(self, connection: AsyncConnection, task: Task) -> StoredJob:
        return await self._family.of_uid(connection, task.uid)

    async def _move(
        self, connection: AsyncConnection, job: StoredJob, state: int, changed: FineTuningJob, why: str = ""
    ) -> None:
        attempt = changed.num_attempts
        private = None
        if self._family.lifecycle.is_final(state):
            _end_pause(changed)
            if job.private.start_files:
                private = job.copy_private()
                del private.start_files[:]
        await self._family.move(
            connection, job, state, changed=changed, private=private, why=why, attempt=attempt
        )


def _end_pause(job: FineTuningJob) -> None:
    """Count the pause of a job that is over; before its first start none is a part of its time."""
    if not job.HasField("pause_time"):
        return
    if job.HasField("start_time"):
        now = Timestamp()
        now.GetCurrentTime()
        job.paused_seconds += max(0.0, (now.ToMicroseconds() - job.pause_time.ToMicroseconds()) / 1e6)
    job.ClearField("pause_time")
