"""Tasks in SQL."""

from __future__ import annotations

import time
import uuid
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Row, Subquery, case, delete, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from luthier.errors import FailedPrecondition, Reason
from luthier.runtime import tracing
from luthier.storage import blob_refs
from luthier.storage.blob_refs import task_owner
from luthier.work.limits import KEPT_SLOTS, PROJECT_SLOTS
from luthier.work.requirements import Requirements
from luthier.work.schema import tasks
from luthier.work.tasks import NewTask, Task, TaskKind, TaskState, Wanted

_ANY_NUMBER = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class QueuedGroup:
    """Queued tasks that are alike.

    Attributes:
        kind: what they do.
        required: what a worker must have to be given one.
        said: what their resources say while no worker is there; empty: nothing.
    """

    kind: TaskKind
    required: Requirements
    said: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StandingGroup:
    """Unfinished tasks that are alike.

    Attributes:
        kind: what they do.
        project: whose they are.
        state: QUEUED, LEASED or PAUSED.
        required: what a worker must have to be given one.
        number: how many.
        num_put_off: those of them that are not handed out yet.
        oldest_seconds: since the first of them was queued.
    """

    kind: TaskKind
    project: str
    state: TaskState
    required: Requirements
    number: int
    num_put_off: int
    oldest_seconds: float


class Tasks:
    """The tasks table; every method runs in the caller's transaction."""

    async def add(self, connection: AsyncConnection, new: NewTask) -> Task:
        """Store a queued task, whose turn is that of its resource's first: what remains of work waits none anew."""
        task = Task(
            task_id=uuid.uuid4().hex,
            kind=new.kind,
            uid=new.uid,
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
            heard=False,
            share=new.share,
            traceparent=tracing.current().traceparent,
        )
        now_us = _now_us()
        first = select(func.min(tasks.c.turn_at_us)).where(tasks.c.uid == new.uid)
        row = {name: getattr(task, name) for name in Task.__slots__}
        row |= {
            "resources": list(new.resources),
            "queued_at_us": now_us,
            "turn_at_us": (await connection.execute(first)).scalar() or now_us,
            "required_device": new.required.device,
            "required_memory_bytes": new.required.memory_bytes,
            "required_ranks": new.required.num_ranks,
        }
        await connection.execute(insert(tasks).values(**row))
        return task

    async def get(self, connection: AsyncConnection, task_id: str) -> Task | None:
        """Return a task, or None."""
        row = (await connection.execute(select(tasks).where(tasks.c.task_id == task_id))).first()
        return _task(row) if row is not None else None

    async def held(self, connection: AsyncConnection, task_id: str, epoch: int) -> Task:
        """Return a task if it is leased under this very epoch.

        Raises:
            FailedPrecondition: LEASE_LOST.
        """
        task = await self.get(connection, task_id)
        if task is None or task.state is not TaskState.LEASED or task.epoch != epoch:
            current = "no task has this id" if task is None else f"it is {task.state} at epoch {task.epoch}"
            raise FailedPrecondition(
                reason=Reason.LEASE_LOST,
                message=f"task {task_id!r} is not leased at epoch {epoch}: {current}; drop it",
                metadata={"task": task_id, "epoch": str(epoch)},
            )
        return task

    async def of_resource(self, connection: AsyncConnection, uid: str) -> list[Task]:
        """Return the tasks that work for a resource, the whole first, then by share."""
        statement = select(tasks).where(tasks.c.uid == uid).order_by(tasks.c.share)
        return [_task(row) for row in await connection.execute(statement)]

    async def leased(self, connection: AsyncConnection) -> list[Task]:
        """Return all tasks under a lease."""
        statement = select(tasks).where(tasks.c.state == TaskState.LEASED)
        return [_task(row) for row in await connection.execute(statement)]

    async def of_claim(self, connection: AsyncConnection, worker: str, claim: str) -> Task | None:
        """Return the task that an earlier call of the same claim leased to `worker`, or None."""
        statement = select(tasks).where(
            tasks.c.state == TaskState.LEASED, tasks.c.worker == worker, tasks.c.claim == claim
        )
        row = (await connection.execute(statement)).first()
        return _task(row) if row is not None else None

    async def take_next(self, connection: AsyncConnection, wanted: Wanted) -> tuple[Task, float] | None:
        """Lease the task whose turn it is of those that the worker can do; returns it and the seconds it waited.

        Projects take turns: the one that holds the fewest leases of a kind comes first, then the task whose turn is the
        oldest. A task that requires more than the worker has takes nobody's turn, nor does one whose project holds all
        slots of the worker but one that is kept for others.
        """
        held, own = _held(), _held(wanted.worker)
        most = case({kind: PROJECT_SLOTS[kind] for kind in KEPT_SLOTS}, value=tasks.c.kind, else_=_ANY_NUMBER)
        statement = (
            select(tasks)
            .outerjoin(held, (held.c.kind == tasks.c.kind) & (held.c.project == tasks.c.project))
            .outerjoin(own, (own.c.kind == tasks.c.kind) & (own.c.project == tasks.c.project))
            .where(
                func.coalesce(own.c.number, 0) < most,
                tasks.c.state == TaskState.QUEUED,
                tasks.c.kind.in_(list(wanted.kinds)),
                tasks.c.not_before_us <= _now_us(),
                tasks.c.required_device.in_(list(wanted.equipment.devices_met)),
                tasks.c.required_memory_bytes <= wanted.equipment.memory_bytes,
                tasks.c.required_ranks <= wanted.equipment.ranks_met,
            )
            .order_by(func.coalesce(held.c.number, 0), tasks.c.turn_at_us)
            .limit(1)
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
            worker=wanted.worker,
            last_local_number=0,
            claim=wanted.claim,
            heard=False,
            not_before_us=0,
            delays=0,
            said="",
        )
        return task, max(0.0, (_now_us() - row.queued_at_us) / 1e6)

    async def queued_groups(self, connection: AsyncConnection) -> list[QueuedGroup]:
        """Return each group of queued tasks that is there."""
        required = (tasks.c.required_device, tasks.c.required_memory_bytes, tasks.c.required_ranks)
        columns = (tasks.c.kind, tasks.c.said, *required)
        statement = select(*columns).where(tasks.c.state == TaskState.QUEUED).distinct()
        return [
            QueuedGroup(
                kind=TaskKind(kind),
                required=Requirements(device=device, memory_bytes=memory, num_ranks=ranks),
                said=said,
            )
            for kind, said, device, memory, ranks in await connection.execute(statement)
        ]

    async def say(
        self, connection: AsyncConnection, group: QueuedGroup, text: str, most: int
    ) -> list[tuple[Task, bool]]:
        """Note for at most `most` tasks of a group that their resources say something else now, empty: nothing.

        Returns them, and of each whether it is the first that is said of it.
        """
        assert text != group.said, "what is said already would be found again for ever"
        statement = (
            select(tasks)
            .where(
                tasks.c.state == TaskState.QUEUED,
                tasks.c.kind == group.kind,
                tasks.c.required_device == group.required.device,
                tasks.c.required_memory_bytes == group.required.memory_bytes,
                tasks.c.required_ranks == group.required.num_ranks,
                tasks.c.said == group.said,
            )
            .limit(most)
        )
        found = (await connection.execute(statement)).all()
        ids = [row.task_id for row in found]
        changes = {"said": text, **({"told": True} if text else {})}
        await connection.execute(update(tasks).where(tasks.c.task_id.in_(ids)).values(changes))
        return [(_task(row), bool(text) and not row.told) for row in found]

    async def note_heard(self, connection: AsyncConnection, task_id: str, epoch: int) -> None:
        """Remember that the holder of a lease spoke of it, if it is still held under this epoch."""
        is_held = (tasks.c.state == TaskState.LEASED) & (tasks.c.epoch == epoch)
        await connection.execute(update(tasks).where(tasks.c.task_id == task_id, is_held).values(heard=True))

    async def requeue(
        self, connection: AsyncConnection, task_id: str, losses: int, seconds: float = 0.0
    ) -> Task:
        """Put a task back at the end of the queue, to be taken in so many seconds at the earliest.

        What its worker was promised to find is let go.
        """
        await blob_refs.drop(connection, task_owner(task_id))
        now_us = _now_us()
        return await self.change(
            connection,
            task_id,
            state=TaskState.QUEUED,
            queued_at_us=now_us,
            turn_at_us=now_us,
            not_before_us=now_us + round(seconds * 1e6) if seconds else 0,
            losses=losses,
            pause_requested=False,
        )

    async def pause(self, connection: AsyncConnection, task_id: str, losses: int) -> Task:
        """Let a task be given to nobody until it is queued again.

        What its worker was promised to find is let go, and what its resource said of waiting is over.
        """
        await blob_refs.drop(connection, task_owner(task_id))
        now_us = _now_us()
        return await self.change(
            connection, task_id, state=TaskState.PAUSED, queued_at_us=now_us, losses=losses, said=""
        )

    async def put_off(self, connection: AsyncConnection, task_id: str, seconds: float) -> None:
        """Keep a queued task from being taken for some time."""
        not_before_us = _now_us() + round(seconds * 1e6)
        await self.change(connection, task_id, not_before_us=not_before_us, delays=tasks.c.delays + 1)

    async def put_off_for(self, connection: AsyncConnection) -> list[float]:
        """Return for how many seconds queued tasks are put off, those that are."""
        now_us = _now_us()
        statement = select(tasks.c.not_before_us).where(
            tasks.c.state == TaskState.QUEUED, tasks.c.not_before_us > now_us
        )
        return [(not_before_us - now_us) / 1e6 for (not_before_us,) in await connection.execute(statement)]

    async def delays(self, connection: AsyncConnection, task_id: str) -> int:
        """Return how often a task was put off since it was last taken."""
        statement = select(tasks.c.delays).where(tasks.c.task_id == task_id)
        return int((await connection.execute(statement)).scalar_one())

    async def end(self, connection: AsyncConnection, task_id: str) -> Task:
        """Mark a task finished, and let go what its worker was promised to find."""
        await blob_refs.drop(connection, task_owner(task_id))
        return await self.change(connection, task_id, state=TaskState.DONE, ended_at_us=_now_us())

    async def forget_finished(self, connection: AsyncConnection, older_than_seconds: float, most: int) -> int:
        """Delete at most `most` tasks that ended longer ago than that; returns how many."""
        ended = (
            select(tasks.c.task_id)
            .where(
                tasks.c.state == TaskState.DONE,
                tasks.c.ended_at_us < _now_us() - round(older_than_seconds * 1e6),
            )
            .limit(most)
        )
        return (await connection.execute(delete(tasks).where(tasks.c.task_id.in_(ended)))).rowcount

    async def change(self, connection: AsyncConnection, task_id: str, **values: Any) -> Task:
        """Set columns of one task and return it."""
        statement = update(tasks).where(tasks.c.task_id == task_id).values(**values).returning(tasks)
        return _task((await connection.execute(statement)).one())

    async def standing(self, connection: AsyncConnection) -> list[StandingGroup]:
        """Return how many unfinished tasks there are of each group, and since when the first of them waits."""
        columns = tasks.c
        alike = (
            columns.kind,
            columns.project,
            columns.state,
            columns.required_device,
            columns.required_memory_bytes,
            columns.required_ranks,
        )
        now_us = _now_us()
        statement = (
            select(
                *alike,
                func.count().label("number"),
                func.sum(case((columns.not_before_us > now_us, 1), else_=0)).label("put_off"),
                func.min(columns.queued_at_us).label("since_us"),
            )
            # Not `!= DONE`: only equality finds the index, and finished tasks are nearly all of them.
            .where(columns.state.in_([TaskState.QUEUED, TaskState.LEASED, TaskState.PAUSED]))
            .group_by(*alike)
        )
        return [
            StandingGroup(
                kind=TaskKind(row.kind),
                project=row.project,
                state=TaskState(row.state),
                required=Requirements(
                    device=row.required_device,
                    memory_bytes=row.required_memory_bytes,
                    num_ranks=row.required_ranks,
                ),
                number=row.number,
                num_put_off=row.put_off,
                oldest_seconds=max(0.0, (now_us - row.since_us) / 1e6),
            )
            for row in await connection.execute(statement)
        ]

    async def held_by(self, connection: AsyncConnection) -> dict[str, list[tuple[TaskKind, str]]]:
        """Return the tasks that each holder of a lease has: the kind and the project of each."""
        columns = (tasks.c.worker, tasks.c.kind, tasks.c.project)
        statement = select(*columns).where(tasks.c.state == TaskState.LEASED)
        held: defaultdict[str, list[tuple[TaskKind, str]]] = defaultdict(list)
        for row in await connection.execute(statement):
            held[row.worker].append((TaskKind(row.kind), row.project))
        return dict(held)


def _held(worker: str | None = None) -> Subquery:
    """Return how many leases of a kind each project holds, of one worker or of all."""
    leased = tasks.c.state == TaskState.LEASED
    return (
        select(tasks.c.kind, tasks.c.project, func.count().label("number"))
        .where(leased if worker is None else leased & (tasks.c.worker == worker))
        .group_by(tasks.c.kind, tasks.c.project)
        .subquery()
    )


def _now_us() -> int:
    return time.time_ns() // 1000


def _task(row: Row[Any]) -> Task:
    return Task(
        task_id=row.task_id,
        kind=TaskKind(row.kind),
        uid=row.uid,
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
        heard=row.heard,
        share=row.share,
        traceparent=row.traceparent,
        attempt_traceparent=row.attempt_traceparent,
        pause_requested=row.pause_requested,
    )
