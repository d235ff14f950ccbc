"""Tasks that no worker can be given: their resources say so, and why, until a worker is there that can."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from luthier.errors.failure import Failure
from luthier.errors.status import failure_to_status
from luthier.storage.database import Database
from luthier.work.events import line
from luthier.work.fitting import Equipped, failure_of
from luthier.work.handlers import TaskHandler
from luthier.work.log import EventLog
from luthier.work.repository import QueuedGroup, Tasks
from luthier.work.requirements import Requirements
from luthier.work.tasks import TaskKind

PATIENCE_SECONDS = 60.0
"""Workers start again within this; before, nobody is told that there is none."""
_BATCH = 100
_logger = logging.getLogger(__name__)


class Present(Protocol):
    """Knows which workers are heard of."""

    def present(self) -> Sequence[Equipped]:
        """Return them."""
        ...


class WaitingTasks:
    """Compares what queued tasks require with what the workers that are heard of have.

    What a resource says is stored with its task, so that it is taken back after a restart too; an event tells of it
    once in a task's life. What is remembered here is only since when nobody has been there.
    """

    def __init__(
        self,
        database: Database,
        log: EventLog,
        handlers: Mapping[TaskKind, TaskHandler],
        workers: Present,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._database = database
        self._log = log
        self._handlers = handlers
        self._workers = workers
        self._clock = clock
        self._tasks = Tasks()
        self._lacking_since: dict[tuple[TaskKind, Requirements], float] = {}

    async def look(self) -> None:
        """Let resources say that nobody can work for them once that has lasted, and no longer where somebody can."""
        async with self._database.reading() as connection:
            groups = await self._tasks.queued_groups(connection)
        lacks = self._lacks({(group.kind, group.required) for group in groups})
        now = self._clock()
        for group in groups:
            key = (group.kind, group.required)
            failure = lacks.get(key)
            if failure is None:
                if group.said:
                    await self._tell(group, None)
            elif group.said != failure.message and now - self._lacking_since[key] >= PATIENCE_SECONDS:
                await self._tell(group, failure)

    def _lacks(
        self, wanted: set[tuple[TaskKind, Requirements]]
    ) -> Mapping[tuple[TaskKind, Requirements], Failure]:
        """Return why nobody can be given what is wanted, where nobody can; remembers since when."""
        present = self._workers.present()
        found = {
            key: failure for key in wanted if (failure := failure_of(key[0], key[1], present)) is not None
        }
        now = self._clock()
        self._lacking_since = {key: self._lacking_since.get(key, now) for key in found}
        return found

    async def _tell(self, group: QueuedGroup, failure: Failure | None) -> None:
        """Let the resources of a group say something else, a few a transaction: others write in between."""
        if failure is not None:
            _logger.warning(
                "tasks wait for a worker", extra={"kind": group.kind.value, "detail": failure.message}
            )
        while await self._tell_some(group, failure) == _BATCH:
            pass

    async def _tell_some(self, group: QueuedGroup, failure: Failure | None) -> int:
        text = failure.message if failure is not None else ""
        status = failure_to_status(failure) if failure is not None else None
        async with self._database.transaction() as connection:
            changed = await self._tasks.say(connection, group, text, _BATCH)
            for task, is_first in changed:
                await self._handlers[task.kind].waits(connection, task, status)
                if is_first:
                    await self._log.append(connection, task.uid, [line(text, "WARNING")])
        return len(changed)
