"""Jobs, checkpoints and metrics in SQL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import delete, select
from sqlalchemy.dialects import sqlite
from sqlalchemy.engine import RowMapping
from sqlalchemy.ext.asyncio import AsyncConnection

from luthier.errors import NotFound
from luthier.storage.resources import Resources
from luthier.training.jobs.domain import Checkpoint, CheckpointFile, Job, MetricPoint
from luthier.training.schema import checkpoints, fine_tuning_jobs, metric_points

VALIDATION_LOSS = "validation_loss"
_ALL = 1_000_000


def jobs() -> Resources[Job]:
    """Return the jobs as stored resources."""
    return Resources(fine_tuning_jobs, Job)


class Checkpoints:
    """The checkpoints of all jobs; one a job and step, the first one stays."""

    async def add(self, connection: AsyncConnection, checkpoint: Checkpoint) -> bool:
        """Store a checkpoint; return False, and change nothing, when the job has one of that step."""
        row: dict[str, Any] = {
            "job": checkpoint.job,
            "step": checkpoint.step,
            "name": checkpoint.name,
            "uid": checkpoint.uid,
            "attempt": checkpoint.attempt,
            "metrics": dict(checkpoint.metrics),
            "files": [[file.path, file.sha256, file.size_bytes] for file in checkpoint.files],
            "digest": checkpoint.digest,
            "size_bytes": checkpoint.size_bytes,
            "create_time_us": round(checkpoint.create_time.timestamp() * 1e6),
        }
        statement = sqlite.insert(checkpoints).values(row).on_conflict_do_nothing()
        return (await connection.execute(statement)).rowcount == 1

    async def drop_older(self, connection: AsyncConnection, job: str, keep: int) -> Sequence[Checkpoint]:
        """Drop all but the last `keep` checkpoints of a job and the best; return those that went.

        The best has the lowest validation_loss of all that were taken at a validated step.
        """
        kept = await self.after(connection, job, 0, _ALL)
        validated = [point for point in kept if VALIDATION_LOSS in point.metrics]
        best = min(validated, key=lambda point: point.metrics[VALIDATION_LOSS], default=None)
        dropped = [point for point in kept[:-keep] if point is not best]
        columns = checkpoints.c
        for point in dropped:
            await connection.execute(
                delete(checkpoints).where(columns.job == job, columns.step == point.step)
            )
        return dropped

    async def get(self, connection: AsyncConnection, name: str) -> Checkpoint:
        """Return a checkpoint. Raises NotFound."""
        result = await connection.execute(select(checkpoints).where(checkpoints.c.name == name))
        row = result.mappings().one_or_none()
        if row is None:
            raise NotFound(f"{name} does not exist", metadata={"name": name})
        return _checkpoint(row)

    async def latest(self, connection: AsyncConnection, job: str) -> Checkpoint | None:
        """Return the checkpoint of the highest step, the one to resume from; None before the first."""
        columns = checkpoints.c
        statement = select(checkpoints).where(columns.job == job).order_by(columns.step.desc()).limit(1)
        row = (await connection.execute(statement)).mappings().one_or_none()
        return None if row is None else _checkpoint(row)

    async def after(
        self, connection: AsyncConnection, job: str, step: int, limit: int
    ) -> Sequence[Checkpoint]:
        """Return at most `limit` checkpoints of a job after `step`, in order of steps."""
        columns = checkpoints.c
        statement = (
            select(checkpoints)
            .where(columns.job == job, columns.step > step)
            .order_by(columns.step)
            .limit(limit)
        )
        return [_checkpoint(row) for row in (await connection.execute(statement)).mappings()]


class Metrics:
    """Metric values by job and step; the last attempt that made a step wins."""

    async def record(
        self, connection: AsyncConnection, job: str, step: int, attempt: int, values: Mapping[str, float]
    ) -> None:
        """Store values; they join those of the same attempt and step, and replace those of an earlier one."""
        columns = metric_points.c
        statement = select(columns.attempt, columns.metric_values).where(
            columns.job == job, columns.step == step
        )
        known = (await connection.execute(statement)).one_or_none()
        if known is not None and known[0] == attempt:
            values = {**known[1], **values}
        row = {"attempt": attempt, "metric_values": dict(values)}
        upsert = sqlite.insert(metric_points).values(job=job, step=step, **row)
        await connection.execute(upsert.on_conflict_do_update(index_elements=["job", "step"], set_=row))

    async def after(
        self, connection: AsyncConnection, job: str, step: int, limit: int
    ) -> Sequence[MetricPoint]:
        """Return at most `limit` points of a job after `step`, in order of steps."""
        columns = metric_points.c
        statement = (
            select(metric_points)
            .where(columns.job == job, columns.step > step)
            .order_by(columns.step)
            .limit(limit)
        )
        return [
            MetricPoint(step=row["step"], attempt=row["attempt"], values=row["metric_values"])
            for row in (await connection.execute(statement)).mappings()
        ]


def _checkpoint(row: RowMapping) -> Checkpoint:
    return Checkpoint(
        name=row["name"],
        uid=row["uid"],
        job=row["job"],
        step=row["step"],
        attempt=row["attempt"],
        metrics=row["metrics"],
        files=tuple(
            CheckpointFile(path=path, sha256=sha256, size_bytes=size) for path, sha256, size in row["files"]
        ),
        digest=row["digest"],
        size_bytes=row["size_bytes"],
        create_time=datetime.fromtimestamp(row["create_time_us"] / 1e6, tz=UTC),
    )
