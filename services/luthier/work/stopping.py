"""What callers want of work that is queued or done: that it stops, pauses, or goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from sqlalchemy.ext.asyncio import AsyncConnection

from luthier.storage.database import Database
from luthier.work.attempts import Attempts
from luthier.work.repository import Tasks
from luthier.work.tasks import Outcome, TaskState


@dataclass(frozen=True, slots=True, kw_only=True)
class Stopping:
    """Changes the tasks of a resource in the caller's transaction; `announce` lets workers look at the queue."""

    database: Database
    attempts: Attempts
    announce: Callable[[], None]
    _tasks: Tasks = field(default_factory=Tasks)

    async def cancel(self, connection: AsyncConnection, uid: str) -> bool:
        """Stop the tasks of a resource: at once those that no worker has, by their workers those that are leased.

        Finished tasks are left alone. Returns whether there was any other.
        """
        is_live = False
        for seen in await self._tasks.of_resource(connection, uid):
            if seen.state is TaskState.DONE:
                continue
            is_live = True
            task = await self._tasks.change(connection, seen.task_id, cancel_requested=True)
            if task.state is not TaskState.LEASED:
                await self.attempts.end(connection, task, Outcome(cancelled=True))
        return is_live

    async def pause(self, connection: AsyncConnection, uid: str) -> None:
        """Have the tasks of a resource given to nobody.

        At once those that are queued, and those that are leased once their workers have given them back.
        """
        for seen in await self._tasks.of_resource(connection, uid):
            if seen.state in (TaskState.DONE, TaskState.PAUSED):
                continue
            task = await self._tasks.change(connection, seen.task_id, pause_requested=True)
            if task.state is TaskState.QUEUED:
                await self.attempts.rest(connection, task, task.losses)

    async def resume(self, connection: AsyncConnection, uid: str) -> bool:
        """Queue the paused tasks of a resource again, behind those that wait. Returns whether there was any."""
        tasks = await self._tasks.of_resource(connection, uid)
        paused = [seen for seen in tasks if seen.state is TaskState.PAUSED]
        for seen in paused:
            await self._tasks.requeue(connection, seen.task_id, seen.losses)
        self.database.after_commit(self.announce)
        return bool(paused)
