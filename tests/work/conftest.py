"""A queue on a real database, and a handler that writes down what it is told."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from google.rpc import status_pb2
from prometheus_client import CollectorRegistry
from sqlalchemy.ext.asyncio import AsyncConnection
from tests.stores import database_url, open_database

from luthier.data.schema import MIGRATIONS as DATA_MIGRATIONS
from luthier.errors import Failure
from luthier.runtime.field_limits import Limits
from luthier.storage.database import Database
from luthier.storage.migrations import upgrade
from luthier.v1 import event_pb2, fine_tuning_job_pb2
from luthier.work import schema
from luthier.work.events import state_changed
from luthier.work.leases import Leases
from luthier.work.log import EventLog
from luthier.work.metrics import WorkMetrics
from luthier.work.queue import Queue, QueueSettings
from luthier.work.queue_figures import QueueFigures
from luthier.work.requirements import Requirements
from luthier.work.tasks import NewTask, Task, TaskKind
from luthier.work.workers import Workers
from luthier.worker.v1 import task_pb2, worker_service_pb2


def uid_of(subject: str) -> str:
    """The uid of a resource that only a test knows; another text than its name."""
    return f"uid of {subject}"


def new_task(
    subject: str,
    kind: TaskKind = TaskKind.TRAIN,
    project: str = "p",
    resources: tuple[str, ...] = (),
    required: Requirements | None = None,
) -> NewTask:
    """What is queued for such a resource."""
    return NewTask(
        kind=kind,
        uid=uid_of(subject),
        subject=subject,
        project=project,
        resources=resources,
        required=required or Requirements(),
    )


def attempt_kind(event: event_pb2.Event) -> str:
    """What became of an attempt, STARTED say; empty for other events."""
    if not event.HasField("attempt_change"):
        return ""
    return event_pb2.AttemptChange.Kind.Name(event.attempt_change.kind).removeprefix("KIND_")


@dataclass
class RecordingHandler:
    """Writes down every call; ends its subject with a final state."""

    log: EventLog
    calls: list[tuple[str, int]] = field(default_factory=list)
    results: list[task_pb2.TaskResult | None] = field(default_factory=list)
    rollouts: list[worker_service_pb2.CommitRolloutsRequest] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    waiting: dict[str, str] = field(default_factory=dict)
    result_limits: dict[str, Limits] = field(default_factory=dict)
    refusals: dict[str, Exception] = field(default_factory=dict)
    """What is raised by subject: when a task starts, under `lost <subject>` when it is lost, and so on.

    What is under `rollouts` is raised once.
    """

    async def specify(self, connection: AsyncConnection, task: Task) -> task_pb2.Task:
        if error := self.refusals.get(f"specify {task.subject}"):
            raise error
        if task.kind is TaskKind.REGISTER_MODEL:
            return task_pb2.Task(register_model=task_pb2.RegisterModelSpec(directory="d"))
        return task_pb2.Task(train=task_pb2.TrainSpec(rendering_digest="r"))

    async def started(self, connection: AsyncConnection, task: Task) -> None:
        if error := self.refusals.get(task.subject):
            raise error
        self.calls.append(("started", task.attempt))

    async def reporting(
        self, connection: AsyncConnection, task: Task, events: Sequence[event_pb2.Event]
    ) -> None:
        """Events are recorded as they come."""

    async def reported(
        self,
        connection: AsyncConnection,
        task: Task,
        events: Sequence[event_pb2.Event],
        run_record: fine_tuning_job_pb2.RunRecord | None,
    ) -> None:
        self.calls.append(("reported", len(events)))

    async def checkpointed(
        self,
        connection: AsyncConnection,
        task: Task,
        step: int,
        files: Sequence[task_pb2.BlobFile],
        metrics: Mapping[str, float],
    ) -> str:
        self.calls.append(("checkpointed", step))
        return f"{task.subject}/checkpoints/{step}"

    async def rolled_out(
        self,
        connection: AsyncConnection,
        task: Task,
        request: worker_service_pb2.CommitRolloutsRequest,
    ) -> None:
        if error := self.refusals.pop("rollouts", None):
            raise error
        self.calls.append(("rolled_out", request.step))
        self.rollouts.append(request)

    async def succeeded(self, connection: AsyncConnection, task: Task, result: task_pb2.TaskResult) -> None:
        self.results.append(result)
        await self._end(connection, task, "SUCCEEDED")

    async def failed(
        self,
        connection: AsyncConnection,
        task: Task,
        failure: Failure,
        result: task_pb2.TaskResult | None,
    ) -> None:
        if error := self.refusals.get(f"failed {task.subject}"):
            raise error
        self.failures.append(failure)
        self.results.append(result)
        await self._end(connection, task, "FAILED")

    async def cancelled(
        self, connection: AsyncConnection, task: Task, result: task_pb2.TaskResult | None
    ) -> None:
        await self._end(connection, task, "CANCELLED")

    async def waits(self, connection: AsyncConnection, task: Task, why: status_pb2.Status | None) -> None:
        if error := self.refusals.get(f"waits {task.subject}"):
            raise error
        self.waiting[task.subject] = why.message if why is not None else ""

    async def lost(self, connection: AsyncConnection, task: Task) -> None:
        if error := self.refusals.get(f"lost {task.subject}"):
            raise error
        self.calls.append(("lost", task.attempt))

    async def paused(self, connection: AsyncConnection, task: Task) -> None:
        self.calls.append(("paused", task.attempt))

    async def _end(self, connection: AsyncConnection, task: Task, state: str) -> None:
        self.calls.append((state, task.attempt))
        await self.log.append(connection, task.uid, [state_changed(state)], final=True)


class Clock:
    """A monotonic clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Bench:
    """Everything that a test of the queue needs."""

    database: Database
    log: EventLog
    handler: RecordingHandler
    clock: Clock
    queue: Queue
    registry: CollectorRegistry

    async def enqueue(
        self, subject: str = "jobs/a", project: str = "p", required: Requirements | None = None
    ) -> Task:
        async with self.database.transaction() as connection:
            new = new_task(subject, project=project, resources=("r",), required=required)
            return await self.queue.enqueue(connection, new)

    async def claim(self, worker: str = "w@1", wait_seconds: float = 0.0) -> Task | None:
        """Claim as a worker does, with the first heartbeat that says that the task arrived."""
        claimed = await self.queue.claim(worker, [TaskKind.TRAIN], wait_seconds)
        if claimed is None:
            return None
        return await self.queue.heartbeat(claimed[0].task_id, claimed[0].epoch)

    async def kinds(self, subject: str = "jobs/a") -> list[str]:
        """Names of the subject's events, numbered without gaps."""
        async with self.database.reading() as connection:
            events = await self.log.read(connection, uid_of(subject), 1, 1000)
        assert [event.sequence for event in events] == list(range(1, len(events) + 1))
        return [attempt_kind(event) or str(event.WhichOneof("payload")) for event in events]

    async def look(self, workers: Workers | None = None) -> None:
        """Show in the metrics how the queue stands."""
        metrics = self.queue.metrics
        await QueueFigures(self.database, workers or Workers(metrics), metrics).look()

    def successor(self, settings: QueueSettings | None = None) -> Queue:
        """The queue of a restarted service on the same database."""
        registry = CollectorRegistry()
        settings = settings or self.queue.settings
        metrics = WorkMetrics(registry, (TaskKind.TRAIN,))
        leases = Leases(settings.lease_seconds, self.clock)
        queue = Queue(self.database, self.log, metrics, settings, leases)
        queue.register(TaskKind.TRAIN, self.handler)
        return queue


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    database = open_database(tmp_path / "work")
    async with database.transaction() as connection:
        await connection.run_sync(schema.metadata.create_all)
    log = EventLog(database, heartbeat_seconds=0.05)
    handler = RecordingHandler(log)
    clock = Clock()
    registry = CollectorRegistry()
    settings = QueueSettings(lease_seconds=10.0, max_losses=3, retry_seconds=0.0)
    metrics = WorkMetrics(registry, (TaskKind.TRAIN,))
    queue = Queue(database, log, metrics, settings, Leases(settings.lease_seconds, clock))
    queue.register(TaskKind.TRAIN, handler)
    yield Bench(database, log, handler, clock, queue, registry)
    await database.close()


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    """A Data service's database, migrated."""
    upgrade(database_url(tmp_path / "data"), (schema.MIGRATIONS, DATA_MIGRATIONS))
    made = open_database(tmp_path / "data")
    yield made
    await made.close()
