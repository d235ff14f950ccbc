"""A family of its own on a real database and queue: evaluations that nobody evaluates, called things."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry
from sqlalchemy import MetaData
from sqlalchemy.ext.asyncio import AsyncConnection
from tests.stores import open_database
from tests.work.watching import messages

from luthier.errors import Failure
from luthier.errors.status import failure_to_status
from luthier.runtime.field_limits import LimitTable
from luthier.storage.database import Database
from luthier.storage.message_tables import message_table
from luthier.storage.stored import Rows, Stored
from luthier.stored.v1.evaluation_pb2 import EvaluationPrivate
from luthier.v1.evaluation_pb2 import Evaluation
from luthier.v1.event_pb2 import Event
from luthier.work import schema
from luthier.work.families import WAITING, Family, Work
from luthier.work.family_tasks import FamilyTasks, TaskStates
from luthier.work.keeping import Keeping
from luthier.work.lifecycle import Lifecycle
from luthier.work.log import EventLog
from luthier.work.metrics import WorkMetrics
from luthier.work.queue import Queue, QueueSettings
from luthier.work.tasks import Outcome, Task, TaskKind
from luthier.worker.v1 import task_pb2

PARENT = "projects/p"
NAME = f"{PARENT}/evaluations/a"
METADATA = MetaData()
TABLE = message_table("things", METADATA)
NO_LIMITS: LimitTable = {}
State = Evaluation.State
Thing = Stored[Evaluation, EvaluationPrivate]
MOVES: Mapping[int, Sequence[int]] = {
    State.STATE_QUEUED: (State.STATE_RUNNING, State.STATE_CANCELLED, State.STATE_FAILED),
    State.STATE_RUNNING: (
        State.STATE_QUEUED,
        State.STATE_CANCELLING,
        State.STATE_SUCCEEDED,
        State.STATE_FAILED,
    ),
    State.STATE_CANCELLING: (State.STATE_CANCELLED, State.STATE_SUCCEEDED),
    State.STATE_CANCELLED: (),
    State.STATE_SUCCEEDED: (),
    State.STATE_FAILED: (),
}


class ThingTasks(FamilyTasks[Evaluation, EvaluationPrivate]):
    """What every family does alike, and the least of what each does for itself."""

    result_limits = NO_LIMITS

    async def specify(self, connection: AsyncConnection, task: Task) -> task_pb2.Task:
        return task_pb2.Task(evaluate=task_pb2.EvaluateSpec())

    async def succeeded(self, connection: AsyncConnection, task: Task, result: task_pb2.TaskResult) -> None:
        await self._move(connection, task, State.STATE_SUCCEEDED)

    async def failed(
        self, connection: AsyncConnection, task: Task, failure: Failure, result: task_pb2.TaskResult | None
    ) -> None:
        thing = await self._family.of_uid(connection, task.uid)
        changed = thing.copy()
        changed.error.CopyFrom(failure_to_status(failure))
        await self._family.move(connection, thing, State.STATE_FAILED, changed=changed)


@dataclass
class Things:
    """The family, its queue, and what a test asks of them."""

    database: Database
    rows: Rows[Evaluation, EvaluationPrivate]
    family: Family[Evaluation, EvaluationPrivate]
    tasks: ThingTasks
    queue: Queue

    async def add(self, name: str = NAME, *, queued: bool = True, **fields: Any) -> Thing:
        message = Evaluation(name=name, state=State.STATE_QUEUED, **fields)
        work = Work(kind=TaskKind.EVALUATE) if queued else None
        async with self.database.transaction() as connection:
            return await self.family.add(connection, message, EvaluationPrivate(base_model="b"), work)

    async def move(self, thing: Thing, state: int, **options: Any) -> Thing:
        async with self.database.transaction() as connection:
            return await self.family.move(connection, thing, state, **options)

    async def read(self, name: str = NAME) -> Thing:
        return await self.family.read(name)

    async def cancel(self, name: str = NAME, etag: str = "") -> Evaluation:
        return await self.family.cancel(name, etag)

    async def claim(self) -> Task | None:
        """The next task, begun by a worker."""
        claimed = await self.queue.claim("w@1", [TaskKind.EVALUATE], 0.0)
        return claimed[0] if claimed is not None else None

    async def finish(self, task: Task, outcome: Outcome) -> None:
        await self.queue.finish(task.task_id, task.epoch, outcome)

    async def events(self, name: str = NAME, start_sequence: int = 0, number: int = 100) -> list[Event]:
        """The first events from a number on, until the final one or one that says that there is no more yet."""
        found: list[Event] = []
        async with aclosing(messages(self.family.watch(name, start_sequence))) as watching:
            async for event in watching:
                if event.HasField("heartbeat"):
                    break
                found.append(event)
                if len(found) == number:
                    break
        return found

    async def states(self, name: str = NAME) -> list[str]:
        """The states that the events tell of, in order."""
        return [
            event.state_change.state for event in await self.events(name) if event.HasField("state_change")
        ]


@asynccontextmanager
async def things_in(folder: Path) -> AsyncIterator[Things]:
    """The family on a new database below a folder."""
    database = open_database(folder / "things")
    async with database.transaction() as connection:
        await connection.run_sync(schema.metadata.create_all)
        await connection.run_sync(METADATA.create_all)
    log = EventLog(database, heartbeat_seconds=0.05)
    metrics = WorkMetrics(CollectorRegistry(), (TaskKind.EVALUATE,))
    queue = Queue(database, log, metrics, QueueSettings(retry_seconds=0.0))
    rows = Rows(TABLE, Evaluation, EvaluationPrivate, progress_fields=("progress", WAITING))
    family = Family(rows, Lifecycle(State.DESCRIPTOR, MOVES), database, log, queue, Keeping())
    states = TaskStates(queued=State.STATE_QUEUED, begun=State.STATE_RUNNING, cancelled=State.STATE_CANCELLED)
    tasks = ThingTasks(family, states)
    queue.register(TaskKind.EVALUATE, tasks)
    yield Things(database, rows, family, tasks, queue)
    await database.close()
