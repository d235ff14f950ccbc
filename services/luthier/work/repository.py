"""Tasks in SQL."""

from __future__ import annotations

import time
import uuid
from collections.abc import Collection, Mapping
from typing import Any

from sqlalchemy import Row, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from luthier.work.schema import tasks
from luthier.work.tasks import NewTask, Task, TaskKind, TaskState


class Tasks:
    """The tasks table; every method runs in the caller's transaction."""

    async def add(self, connection: AsyncConnection, new: NewTask) -> Task:
        """Store a queued task."""
        task = Task(
            task_id=uuid.uuid4().hex,
            kind=new.kind,
            subject=new.subject,
            project=new.project,
            resources=new.resources,
            state=TaskState.QUEUED,
            epoch=0,
            attempt=0,
            worker="",
            cancel_requested=False,
            last_local_number=0,
            losses=0,
        )
        row = {name: getattr(task, name) for name in Task.__slots__}
        await connection.execute(
            insert(tasks).values(**{**row, "resources": list(new.resources), "queued_at_us": _now_us()})
        )
        return task

    async def get(self, connection: AsyncConnection, task_id: str) -> Task | None:
        """Return a task, or None."""
        row = (await connection.execute(select(tasks).where(tasks.c.task_id == task_id))).first()
        return _task(row) if row is not None else None

    async def of_subject(self, connection: AsyncConnection, subject: str) -> Task | None:
        """Return the task that works for a resource, or None."""
        row = (await connection.execute(select(tasks).where(tasks.c.subject == subject))).first()
        return _task(row) if row is not None else None

    async def leased(self, connection: AsyncConnection) -> list[Task]:
        """Return all tasks under a lease."""
        statement = select(tasks).where(tasks.c.state == TaskState.LEASED)
        return [_task(row) for row in await connection.execute(statement)]

    async def take_oldest(
        self, connection: AsyncConnection, kinds: Collection[TaskKind], worker: str
    ) -> tuple[Task, float] | None:
        """Lease the task queued longest among `kinds`; returns it and the seconds it waited."""
        statement = (
            select(tasks)
            .where(tasks.c.state == TaskState.QUEUED, tasks.c.kind.in_(list(kinds)))
            .order_by(tasks.c.queued_at_us)
            .limit(1)
            .with_for_update(skip_locked=True)
        )
        row = (await connection.execute(statement)).first()
        if row is None:
            return None
        task = await self.change(
            connection,
            row.task_id,
            state=TaskState.LEASED,
            epoch=row.epoch + 1,
            attempt=row.attempt + 1,
            worker=worker,
            last_local_number=0,
        )
        return task, max(0.0, (_now_us() - row.queued_at_us) / 1e6)

    async def requeue(self, connection: AsyncConnection, task_id: str, losses: int) -> Task:
        """Put a task back at the end of the queue."""
        return await self.change(
            connection, task_id, state=TaskState.QUEUED, queued_at_us=_now_us(), losses=losses
        )

    async def change(self, connection: AsyncConnection, task_id: str, **values: Any) -> Task:
        """Set columns of one task and return it."""
        statement = update(tasks).where(tasks.c.task_id == task_id).values(**values).returning(tasks)
        return _task((await connection.execute(statement)).one())

    async def count(self, connection: AsyncConnection) -> Mapping[tuple[str, str], int]:
        """Return the number of tasks by (kind, state), finished ones left out."""
        statement = (
            select(tasks.c.kind, tasks.c.state, func.count())
            .where(tasks.c.state != TaskState.DONE)
            .group_by(tasks.c.kind, tasks.c.state)
        )
        return {(kind, state): number for kind, state, number in await connection.execute(statement)}


def _now_us() -> int:
    return time.time_ns() // 1000


def _task(row: Row[Any]) -> Task:
    return Task(
        task_id=row.task_id,
        kind=TaskKind(row.kind),
        subject=row.subject,
        project=row.project,
        resources=tuple(row.resources),
        state=TaskState(row.state),
        epoch=row.epoch,
        attempt=row.attempt,
        worker=row.worker,
        cancel_requested=row.cancel_requested,
        last_local_number=row.last_local_number,
        losses=row.losses,
    )
