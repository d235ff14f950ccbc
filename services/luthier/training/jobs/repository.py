"""Jobs, checkpoints, metrics and rollouts in SQL; all but jobs by the uid of their job."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy import delete, select
from sqlalchemy.engine import RowMapping
from sqlalchemy.ext.asyncio import AsyncConnection

from luthier.errors import NotFound
from luthier.storage import blob_refs, dialect
from luthier.storage.blob_refs import digests_in
from luthier.storage.pages import parent_of
from luthier.storage.stored import Rows
from luthier.stored.v1.training_pb2 import CheckpointPrivate, FineTuningJobPrivate
from luthier.training.schema import checkpoints, fine_tuning_jobs, metric_points, rollouts
from luthier.v1.fine_tuning_job_pb2 import Checkpoint, FineTuningJob, MetricPoint
from luthier.work.families import WAITING, told_of
from luthier.work.row_file import RowFile

VALIDATION_LOSS = "validation_loss"
VALIDATION_REWARD = "validation_reward"
_ALL = 1_000_000
_NAME = re.compile(r".*/step-(?P<step>0|[1-9][0-9]{0,17})")

_ENDED = ("SUCCEEDED", "FAILED", "CANCELLED")
JobRows = Rows[FineTuningJob, FineTuningJobPrivate]


def jobs() -> JobRows:
    """Return the stored jobs."""
    return Rows(
        fine_tuning_jobs,
        FineTuningJob,
        FineTuningJobPrivate,
        columns={
            "base_model": lambda job, _: job.base_model,
            "rendering": lambda job, _: job.rendering,
            "base_model_uid": lambda job, _: told_of(job, job.base_model),
            "rendering_uid": lambda job, _: told_of(job, job.rendering),
        },
        progress_fields=("progress", "latest_metrics", WAITING),
        blobs=_blobs_of,
    )


def _blobs_of(private: FineTuningJobPrivate) -> Iterator[str]:
    """Yield what a job needs: its start, and the file of the template that its model and checkpoints are taught by."""
    yield from digests_in(private)
    if private.taught.chat_template:
        yield hashlib.sha256(private.taught.chat_template.encode()).hexdigest()


async def job_that_trains(connection: AsyncConnection, model: str) -> str:
    """Return the name of the job that has not ended and will make the model of a name; empty: there is none."""
    jobs, (parent, _, model_id) = fine_tuning_jobs.c, model.rpartition("/models/")
    statement = select(jobs.name, jobs.message).where(
        jobs.parent == parent, jobs.delete_time_us.is_(None), jobs.state.not_in(_ENDED)
    )
    for name, serialised in (await connection.execute(statement)).all():
        if FineTuningJob.FromString(serialised).tuned_model_id == model_id:
            return str(name)
    return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredCheckpoint:
    """A checkpoint as callers see it, and what only the service knows of it."""

    message: Checkpoint
    private: CheckpointPrivate


class Checkpoints:
    """The checkpoints of all jobs; one a job and step, the first one stays."""

    async def add(self, connection: AsyncConnection, job_uid: str, checkpoint: StoredCheckpoint) -> bool:
        """Store a checkpoint; return False, and change nothing, when the job has one of that step."""
        row = {
            "job": job_uid,
            "step": checkpoint.message.step,
            "message": checkpoint.message.SerializeToString(deterministic=True),
            "private": checkpoint.private.SerializeToString(deterministic=True),
        }
        statement = dialect.insert(checkpoints).values(row).on_conflict_do_nothing()
        if (await connection.execute(statement)).rowcount != 1:
            return False
        owner = checkpoint_owner(job_uid, checkpoint.message.step)
        await blob_refs.refer(connection, owner, digests_in(checkpoint.private))
        return True

    async def uids(self, connection: AsyncConnection, job_uid: str) -> list[str]:
        """Return the uids of a job's checkpoints."""
        return [point.message.uid for point in await self.after(connection, job_uid, 0, _ALL)]

    async def drop_older(
        self,
        connection: AsyncConnection,
        job_uid: str,
        keep: int,
        held: Collection[str] = (),
        best_step: int = 0,
    ) -> None:
        """Drop all but the last `keep` checkpoints of a job, the best and those `held`.

        The best is that of `best_step`; 0: that with the lowest validation_loss, or where none has one with the highest
        validation_reward, of all that were taken at a validated step. `held` are uids.
        """
        kept = await self.after(connection, job_uid, 0, _ALL)
        best = _best(kept, best_step)
        dropped = [point for point in kept[:-keep] if point is not best and point.message.uid not in held]
        columns = checkpoints.c
        for point in dropped:
            mine = (columns.job == job_uid, columns.step == point.message.step)
            await connection.execute(delete(checkpoints).where(*mine))
            await blob_refs.drop(connection, checkpoint_owner(job_uid, point.message.step))

    async def get(self, connection: AsyncConnection, name: str) -> StoredCheckpoint:
        """Return a checkpoint. Raises NotFound."""
        columns, owner = checkpoints.c, fine_tuning_jobs.c
        told = _NAME.fullmatch(name)
        statement = (
            select(checkpoints)
            .join(fine_tuning_jobs, owner.uid == columns.job)
            .where(owner.delete_time_us.is_(None), owner.name == parent_of(name))
            .where(columns.step == (int(told["step"]) if told else None))
        )
        row = (await connection.execute(statement)).mappings().one_or_none()
        if row is None:
            raise NotFound(f"{name} does not exist", metadata={"name": name})
        return _checkpoint(row)

    async def at(self, connection: AsyncConnection, job_uid: str, step: int) -> StoredCheckpoint:
        """Return the checkpoint of a job at a step. Raises NotFound."""
        found = await self.after(connection, job_uid, step - 1, 1)
        if not found or found[0].message.step != step:
            raise NotFound(f"the job has no checkpoint of step {step}", metadata={"step": str(step)})
        return found[0]

    async def latest(self, connection: AsyncConnection, job_uid: str) -> StoredCheckpoint | None:
        """Return the checkpoint of the highest step, the one to resume from; None before the first."""
        columns = checkpoints.c
        statement = select(checkpoints).where(columns.job == job_uid).order_by(columns.step.desc()).limit(1)
        row = (await connection.execute(statement)).mappings().one_or_none()
        return None if row is None else _checkpoint(row)

    async def after(
        self, connection: AsyncConnection, job_uid: str, step: int, limit: int
    ) -> Sequence[StoredCheckpoint]:
        """Return at most `limit` checkpoints of a job after `step`, in order of steps."""
        columns = checkpoints.c
        statement = (
            select(checkpoints)
            .where(columns.job == job_uid, columns.step > step)
            .order_by(columns.step)
            .limit(limit)
        )
        return [_checkpoint(row) for row in (await connection.execute(statement)).mappings()]


class Metrics:
    """Metric values by job and step; the last attempt that made a step wins."""

    async def record(
        self, connection: AsyncConnection, job_uid: str, step: int, attempt: int, values: Mapping[str, float]
    ) -> None:
        """Store values; they join those of the same attempt and step, and replace those of an earlier one."""
        columns = metric_points.c
        statement = select(columns.message).where(columns.job == job_uid, columns.step == step)
        known = (await connection.execute(statement)).scalar_one_or_none()
        point = MetricPoint() if known is None else MetricPoint.FromString(known)
        if point.attempt != attempt:
            point = MetricPoint(step=step, attempt=attempt)
        point.values.update(values)
        row = {"message": point.SerializeToString(deterministic=True)}
        upsert = dialect.insert(metric_points).values(job=job_uid, step=step, **row)
        await connection.execute(upsert.on_conflict_do_update(index_elements=["job", "step"], set_=row))

    async def after(
        self, connection: AsyncConnection, job_uid: str, step: int, limit: int
    ) -> Sequence[MetricPoint]:
        """Return at most `limit` points of a job after `step`, in order of steps."""
        columns = metric_points.c
        statement = (
            select(columns.message)
            .where(columns.job == job_uid, columns.step > step)
            .order_by(columns.step)
            .limit(limit)
        )
        return [MetricPoint.FromString(stored) for stored in (await connection.execute(statement)).scalars()]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredRollouts:
    """What one step of a job drew: the file that holds it, and the attempt that committed it."""

    step: int
    attempt: int
    file: RowFile


class Rollouts:
    """The rollouts of all jobs, a file a step."""

    async def put(self, connection: AsyncConnection, job_uid: str, new: StoredRollouts) -> None:
        """Store the rollouts of a step, in place of others."""
        row = {
            "attempt": new.attempt,
            "digest": new.file.sha256,
            "size_bytes": new.file.size_bytes,
            "num_rollouts": new.file.num_rows,
        }
        upsert = dialect.insert(rollouts).values(job=job_uid, step=new.step, **row)
        await connection.execute(upsert.on_conflict_do_update(index_elements=["job", "step"], set_=row))
        owner = rollouts_owner(job_uid, new.step)
        await blob_refs.drop(connection, owner)
        await blob_refs.refer(connection, owner, [new.file.sha256])

    async def since(
        self, connection: AsyncConnection, job_uid: str, step: int, limit: int = _ALL
    ) -> Sequence[StoredRollouts]:
        """Return at most `limit` of a job's from a step on, in order of steps."""
        columns = rollouts.c
        statement = (
            select(rollouts)
            .where(columns.job == job_uid, columns.step >= step)
            .order_by(columns.step)
            .limit(limit)
        )
        return [
            StoredRollouts(
                step=row["step"],
                attempt=row["attempt"],
                file=RowFile(
                    sha256=row["digest"], size_bytes=row["size_bytes"], num_rows=row["num_rollouts"]
                ),
            )
            for row in (await connection.execute(statement)).mappings()
        ]

    async def drop(self, connection: AsyncConnection, job_uid: str, step: int) -> None:
        """Drop a job's from a step on."""
        columns = rollouts.c
        mine = (columns.job == job_uid, columns.step >= step)
        statement = delete(rollouts).where(*mine).returning(columns.step)
        dropped = (await connection.execute(statement)).scalars().all()
        await blob_refs.drop(connection, *(rollouts_owner(job_uid, one) for one in dropped))


def checkpoint_owner(job_uid: str, step: int) -> str:
    """Return what refers to the blobs of a checkpoint."""
    return f"{job_uid}/checkpoints/{step}"


def rollouts_owner(job_uid: str, step: int) -> str:
    """Return what refers to the blob of the rollouts of a step."""
    return f"{job_uid}/rollouts/{step}"


def _best(kept: Sequence[StoredCheckpoint], best_step: int) -> StoredCheckpoint | None:
    if best_step:
        return next((point for point in kept if point.message.step == best_step), None)
    return _lowest(kept, VALIDATION_LOSS) or _lowest(kept, VALIDATION_REWARD, -1.0)


def _lowest(kept: Sequence[StoredCheckpoint], metric: str, sign: float = 1.0) -> StoredCheckpoint | None:
    validated = [point for point in kept if metric in point.message.metrics]
    return min(validated, key=lambda point: sign * point.message.metrics[metric], default=None)


def _checkpoint(row: RowMapping) -> StoredCheckpoint:
    return StoredCheckpoint(
        message=Checkpoint.FromString(row["message"]), private=CheckpointPrivate.FromString(row["private"])
    )
