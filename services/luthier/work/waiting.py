"""Tasks that no worker can be given: their resources say so, and why, until a worker is there that can."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

from luthier.errors import LuthierError, Reason
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
WORDS_SECONDS = 60.0
"""Words about the same requirement stay for this: workers come and go, and each change is written to every task."""
_BATCH = 100
_logger = logging.getLogger(__name__)


class Present(Protocol):
    """Knows which workers are heard of."""

    def present(self) -> Sequence[Equipped]:
        """Return them."""
        ...


class _Lack(NamedTuple):
    """That nobody can be given something, since when, and in words of when that is said."""

    failure: Failure
    since: float
    worded_at: float

    def now(self, failure: Failure, at: float) -> _Lack:
        """Return what is said at a later moment, of which a failure is true."""
        is_other = failure.metadata["requirement"] != self.failure.metadata["requirement"]
        if failure.message != self.failure.message and (is_other or at - self.worded_at >= WORDS_SECONDS):
            return self._replace(failure=failure, worded_at=at)
        return self


class WaitingTasks:
    """Compares what queued tasks require with what the workers that are heard of have.

    What a resource says is stored with its task, so that it is taken back after a restart too; an event tells of it
    once in a task's life. What is remembered here is only since when nobody has been there, and how old the words are.
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
        self._lacks: dict[tuple[TaskKind, Requirements], _Lack] = {}

    async def look(self) -> None:
        """Let resources say that nobody can work for them once that has lasted, and no longer where somebody can."""
        async with self._database.reading() as connection:
            groups = await self._tasks.queued_groups(connection)
        now = self._clock()
        self._note_lacks({(group.kind, group.required) for group in groups}, now)
        for group in groups:
            lack = self._lacks.get((group.kind, group.required))
            if lack is None:
                if group.said:
                    await self._tell(group, None)
            elif group.said != lack.failure.message and now - lack.since >= PATIENCE_SECONDS:
                await self._tell(group, lack.failure)

    def _note_lacks(self, wanted: set[tuple[TaskKind, Requirements]], now: float) -> None:
        """Remember why nobody can be given what is wanted, where nobody can, and since when."""
        present = self._workers.present()
        found: dict[tuple[TaskKind, Requirements], _Lack] = {}
        for key in wanted:
            if (failure := failure_of(key[0], key[1], present)) is not None:
                before = self._lacks.get(key)
                found[key] = _Lack(failure, now, now) if before is None else before.now(failure, now)
        self._lacks = found

    async def _tell(self, group: QueuedGroup, failure: Failure | None) -> None:
        """Let the resources of a group say something else, a few a transaction: others write in between.

        Where one of them cannot, the next look tries again; other groups are told all the same.
        """
        named = {"kind": group.kind.value, "detail": failure.message if failure is not None else ""}
        told: set[str] = set()
        try:
            while await self._tell_some(group, failure, told) == _BATCH:
                pass
        except Exception as error:  # whatever it is: it is of this group
            if isinstance(error, LuthierError) and error.reason == Reason.DISK_FULL:
                _logger.info("no room on the disk to say that tasks wait, or no longer", extra=named)
            else:
                _logger.exception("tasks could not be told that they wait, or no longer", extra=named)
            return
        if failure is not None:
            _logger.warning("tasks wait for a worker", extra=named)

    async def _tell_some(self, group: QueuedGroup, failure: Failure | None, told: set[str]) -> int:
        """Return how many tasks changed; `told` are resources whose log has it from another of their tasks."""
        text = failure.message if failure is not None else ""
        status = failure_to_status(failure) if failure is not None else None
        async with self._database.transaction() as connection:
            changed = await self._tasks.say(connection, group, text, _BATCH)
            for task, is_first in changed:
                await self._handlers[task.kind].waits(connection, task, status)
                if is_first and task.uid not in told:
                    told.add(task.uid)
                    await self._log.append(connection, task.uid, [line(text, "WARNING")])
        return len(changed)
