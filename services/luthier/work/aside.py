"""Tasks that cannot be handed out: put off when the reason may pass, failed by name when it will not."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from sqlalchemy.exc import OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncConnection

from luthier.errors import Failure, Internal, LuthierError
from luthier.storage.database import Database
from luthier.work import elsewhere
from luthier.work.handlers import TaskHandler
from luthier.work.holds import Holds
from luthier.work.leases import Leases
from luthier.work.metrics import WorkMetrics
from luthier.work.repository import Tasks
from luthier.work.tasks import Outcome, Task, TaskKind, TaskState

MAX_DELAYS = 8
"""A task is put off this often, for about four minutes in all, before its reason counts as lasting."""
_FIRST_DELAY_SECONDS = 1.0
_LONGEST_DELAY_SECONDS = 60.0
_PASSING = frozenset({"UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "ABORTED"})
_NOT_OURS = frozenset({TaskState.DONE, TaskState.PAUSED})
"""States of tasks that changed meanwhile: one that was paused is claimed again, and refused again, once it goes on."""
_logger = logging.getLogger(__name__)


class Unclaimable(Exception):
    """What follows a task refused to let it be handed out, or to hear that it was lost."""

    def __init__(self, task: Task, error: Exception) -> None:
        super().__init__(str(error))
        self.task = task
        self.error = error


def is_passing_error(error: Exception) -> bool:
    """Tell whether the same may well succeed a moment later."""
    if isinstance(error, LuthierError):
        return error.code in _PASSING
    return isinstance(error, OperationalError | PoolTimeoutError | TimeoutError)


class Aside:
    """Takes tasks out of the others' way, each in a transaction of its own."""

    def __init__(
        self,
        database: Database,
        handlers: Mapping[TaskKind, TaskHandler],
        metrics: WorkMetrics,
        leases: Leases,
        announce_after: Callable[[float], None],
    ) -> None:
        self._database = database
        self._handlers = handlers
        self._metrics = metrics
        self._leases = leases
        self._announce_after = announce_after
        self._tasks = Tasks()
        self._holds = Holds()

    async def put(self, unclaimable: Unclaimable) -> None:
        """Put a task off, or fail it with the reason. One that changed in the meantime is left alone.

        Raises:
            Exception: the reason itself, when it may pass and the task is leased: its worker may ask again.
        """
        seen, error = unclaimable.task, unclaimable.error
        extra = {"task": seen.task_id, "subject": seen.subject, "kind": seen.kind.value}
        if is_passing_error(error) and await self._put_off(seen, error):
            _logger.warning("task put off", extra={**extra, "detail": str(error)})
            return
        _logger.error("task set aside", exc_info=error, extra=extra)
        failure = Failure.of(error if isinstance(error, LuthierError) else _internal(error))
        try:
            await self._fail(seen, failure)
        except Exception:  # its resource cannot even be told; what matters is that the queue goes on
            _logger.exception("task set aside, and its resource cannot be told", extra=extra)
            await self._fail(seen, None)

    async def _put_off(self, seen: Task, error: Exception) -> bool:
        async with self._database.transaction() as connection:
            task = await self._tasks.get(connection, seen.task_id)
            if task is None or task.state in _NOT_OURS:
                return True
            if task.state is TaskState.LEASED:
                raise error
            delays = await self._tasks.delays(connection, task.task_id)
            if delays >= MAX_DELAYS:
                return False
            seconds = min(_FIRST_DELAY_SECONDS * 2**delays, _LONGEST_DELAY_SECONDS)
            await self._tasks.put_off(connection, task.task_id, seconds)
            self._database.after_commit(lambda: self._announce_after(seconds))
            return True

    async def _fail(self, seen: Task, failure: Failure | None) -> None:
        async with self._database.transaction() as connection:
            task = await self._tasks.get(connection, seen.task_id)
            if task is None or task.state in _NOT_OURS:
                return
            if task.state is TaskState.LEASED and (task.epoch, task.worker) != (seen.epoch, seen.worker):
                return  # another worker was handed it: what refused before does not now
            ended = await self._tasks.end(connection, task.task_id)
            self._database.after_commit(lambda: self._leases.end(task.task_id))
            self._database.after_commit(self._metrics.set_aside.labels(task.kind.value).inc)
            outcome = Outcome(failure=failure or Failure.of(_internal(RuntimeError("it cannot be told"))))
            self._database.after_commit(lambda: self._metrics.task_ended(task, outcome))
            if failure is not None:
                await self._handlers[task.kind].failed(connection, ended, failure, None)
            else:
                await self._let_go(connection, task.uid)

    async def _let_go(self, connection: AsyncConnection, uid: str) -> None:
        """Release what a resource needed until its end: it stays as it is, and nothing will ever work for it."""
        await self._holds.end(connection, uid)
        await elsewhere.release_all(connection, uid)


def _internal(error: Exception) -> Internal:
    return Internal(f"the task cannot be handed out: {type(error).__name__}: {error}")
