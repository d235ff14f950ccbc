"""How attempts begin and end: written down, lost and made again after a while, or over with their task."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

from sqlalchemy.ext.asyncio import AsyncConnection

from luthier.errors import Failure, Reason
from luthier.runtime import tracing
from luthier.storage.database import Database
from luthier.work.events import AttemptKind, attempt_changed
from luthier.work.faults import GIVEN_BACK
from luthier.work.handlers import TaskHandler
from luthier.work.leases import Leases
from luthier.work.limits import KEPT_SLOTS
from luthier.work.log import EventLog
from luthier.work.metrics import WorkMetrics
from luthier.work.repository import Tasks
from luthier.work.results import require_kind
from luthier.work.tasks import Outcome, Task, TaskKind, TaskState
from luthier.work.workers import holder_parts

LONGEST_RETRY_SECONDS = 60.0
_RETRY_GROWTH = 4
_WORKER_IS_WELL = frozenset(
    {
        Reason.JUDGE_UNAVAILABLE,
        Reason.REWARD_SERVICE_UNAVAILABLE,
        Reason.CRASHED,
        Reason.RANK_LOST,
        Reason.RANKS_DIVERGED,
        Reason.TOO_FEW_RANKS,
    }
)
"""Reasons of lost attempts whose worker is well: who waits is told them at the end, and not WORKER_LOST."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempts:
    """Ends attempts in the caller's transaction. The limits are those of `QueueSettings`."""

    database: Database
    log: EventLog
    handlers: Mapping[TaskKind, TaskHandler]
    metrics: WorkMetrics
    leases: Leases
    max_losses: int
    retry_seconds: float
    announce_after: Callable[[float], None]
    _tasks: Tasks = field(default_factory=Tasks)

    async def record(
        self,
        connection: AsyncConnection,
        task: Task,
        kind: AttemptKind,
        message: str = "",
        reason: str = "",
    ) -> None:
        """Log how the current attempt of a task stands."""
        worker = holder_parts(task.worker)[0]
        event = attempt_changed(kind, worker, message, reason, attempt=task.attempt, share=task.share)
        await self.log.append(connection, task.uid, [event])
        if kind != "STARTED":
            self.database.after_commit(lambda: self.metrics.attempt_ended(task, kind.lower(), reason))

    async def begin(self, connection: AsyncConnection, task: Task) -> Task:
        """Log that an attempt begins. It is part of what asked for the task, and has a link to the attempt before."""
        await self.record(connection, task, "STARTED")
        if not task.traceparent or not tracing.is_on():
            if not task.attempt_traceparent:
                return task
            # Of the attempt before: this one is no part of it.
            return await self._tasks.change(connection, task.task_id, attempt_traceparent="")
        with tracing.span(
            f"hand out {task.kind}",
            parent=task.traceparent,
            links=[task.attempt_traceparent] if task.attempt_traceparent else [],
            attributes={
                "luthier.subject": task.subject,
                "luthier.attempt": task.attempt,
                "luthier.worker": holder_parts(task.worker)[0],
            },
        ) as span:
            return await self._tasks.change(connection, task.task_id, attempt_traceparent=span.traceparent)

    async def conclude(self, connection: AsyncConnection, task: Task, outcome: Outcome) -> None:
        """End an attempt as its worker says: lost or given back where the failure passes, paused, or with its task.

        Raises InvalidArgument for a result of another kind of task.
        """
        failure = outcome.failure
        if failure is not None and (failure.code == "UNAVAILABLE" or failure.reason == Reason.DISK_FULL):
            counts = failure.reason not in GIVEN_BACK
            await self.lose(connection, task, failure.message, counts=counts, reason=failure.reason)
        elif outcome.paused:
            await self.pause(connection, task)
        else:
            await self.end(connection, task, outcome)

    async def lose(
        self,
        connection: AsyncConnection,
        task: Task,
        why: str,
        *,
        counts: bool = True,
        reason: str = Reason.WORKER_LOST,
    ) -> None:
        """Queue a task again whose attempt is lost, or end it: it was to stop, or this `counts` once too often.

        It ends with WORKER_LOST then, or with `reason` where the worker is well. One that was to pause is paused.
        """
        losses = task.losses + counts
        self._end_lease(task)
        await self.record(connection, task, "LOST", why, reason)
        if reason == Reason.WORKER_LOST:
            self.database.after_commit(partial(_note_lost, task))
        if task.cancel_requested:
            await self._leave(connection, task)
            await self._close(connection, task, Outcome(cancelled=True))
        elif task.pause_requested:
            await self.rest(connection, task, losses)
        elif losses >= self.max_losses:
            failure = Failure(
                code="UNAVAILABLE",
                reason=reason if reason in _WORKER_IS_WELL else Reason.WORKER_LOST,
                message=f"{losses} attempts were lost and no checkpoint came between them, the last one because {why}",
                metadata={"attempts": str(losses)},
            )
            await self._leave(connection, task)
            await self._close(connection, task, Outcome(failure=failure))
        else:
            await self._queue_again(connection, task, losses, self._retry_seconds(losses) if counts else 0.0)

    def has_ended(self, task: Task, epoch: int, outcome: Outcome) -> bool:
        """Tell whether the attempt of an epoch ended by an outcome like this: its worker did not hear of it."""
        ended = task.state is TaskState.DONE or (task.state is TaskState.PAUSED and outcome.paused)
        return ended and task.epoch == epoch

    async def _leave(self, connection: AsyncConnection, task: Task) -> None:
        """Let nobody hold the epoch of a task that is not queued again: what its worker still brings is refused."""
        await self._tasks.change(connection, task.task_id, epoch=task.epoch + 1)

    async def _queue_again(
        self, connection: AsyncConnection, task: Task, losses: int, seconds: float
    ) -> None:
        task = await self._tasks.requeue(connection, task.task_id, losses, seconds)
        await self.handlers[task.kind].lost(connection, task)
        self.database.after_commit(lambda: self.metrics.task_left(task))
        self.database.after_commit(lambda: self.announce_after(seconds))

    async def pause(self, connection: AsyncConnection, task: Task) -> None:
        """End an attempt that left its checkpoint because it was asked to; nothing is counted against its task.

        A task that was cancelled since ends, and one that was not asked goes on.
        """
        self._end_lease(task)
        await self.record(connection, task, "PAUSED")
        if task.cancel_requested:
            await self._close(connection, task, Outcome(cancelled=True))
        elif task.pause_requested:
            await self.rest(connection, task, task.losses, is_given_back=True)
        else:
            await self._queue_again(connection, task, task.losses, 0.0)

    async def rest(
        self, connection: AsyncConnection, task: Task, losses: int, *, is_given_back: bool = False
    ) -> None:
        """Let a task that nobody has be given to nobody: its worker gave it back, or does not hold it any more."""
        if not is_given_back:
            await self._leave(connection, task)
        task = await self._tasks.pause(connection, task.task_id, losses)
        await self.handlers[task.kind].paused(connection, task)
        self.database.after_commit(lambda: self.metrics.task_left(task))

    async def end(self, connection: AsyncConnection, task: Task, outcome: Outcome) -> None:
        """End a task whose worker, if it has one, brought its outcome.

        Raises InvalidArgument for a result of another kind of task.
        """
        if outcome.result is not None:
            require_kind(task, outcome.result)
        self._end_lease(task)
        # The last attempt of one that is paused has ended as such.
        if task.attempt > 0 and task.state is not TaskState.PAUSED:
            kind: AttemptKind = "SUCCEEDED"
            reason = ""
            if outcome.failure is not None:
                kind, reason = "FAILED", outcome.failure.reason
            elif outcome.cancelled:
                kind = "CANCELLED"
            await self.record(connection, task, kind, reason=reason)
        await self._close(connection, task, outcome)

    def _end_lease(self, task: Task) -> None:
        self.database.after_commit(lambda: self.leases.end(task.task_id))
        if task.state is TaskState.LEASED and task.kind in KEPT_SLOTS:
            # Another of its project may be given a slot now.
            self.database.after_commit(lambda: self.announce_after(0.0))

    def _retry_seconds(self, losses: int) -> float:
        # One lost worker says nothing of the task, and another one takes over at once; two in a row may.
        if losses < 2:
            return 0.0
        seconds: float = self.retry_seconds * _RETRY_GROWTH ** (losses - 2)
        return min(seconds, LONGEST_RETRY_SECONDS)

    async def _close(self, connection: AsyncConnection, task: Task, outcome: Outcome) -> None:
        task = await self._tasks.end(connection, task.task_id)
        handler = self.handlers[task.kind]
        self.database.after_commit(lambda: self.metrics.task_ended(task, outcome))
        if outcome.failure is not None:
            await handler.failed(connection, task, outcome.failure, outcome.result)
        elif outcome.cancelled:
            await handler.cancelled(connection, task, outcome.result)
        else:
            assert outcome.result is not None, "a finished task brings a result"
            await handler.succeeded(connection, task, outcome.result)


def _note_lost(task: Task) -> None:
    """Say in the trace that an attempt is lost: the worker, whose span it is, may never send it."""
    if not task.attempt_traceparent:
        return
    attributes: tracing.Attributes = {
        "luthier.subject": task.subject,
        "luthier.attempt": task.attempt,
        "luthier.worker": holder_parts(task.worker)[0],
    }
    with tracing.span(f"lost {task.kind}", parent=task.attempt_traceparent, attributes=attributes) as span:
        span.failed(Reason.WORKER_LOST)
