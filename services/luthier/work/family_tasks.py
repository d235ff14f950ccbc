"""What every family does alike as its tasks go on: a state for each thing that can happen to a task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from google.protobuf.message import Message
from google.rpc import status_pb2
from sqlalchemy.ext.asyncio import AsyncConnection

from luthier.errors import FailedPrecondition
from luthier.storage.resource_messages import StatefulMessage
from luthier.v1 import event_pb2, fine_tuning_job_pb2
from luthier.work.families import Family
from luthier.work.tasks import Task
from luthier.worker.v1 import task_pb2, worker_service_pb2

M = TypeVar("M", bound=StatefulMessage)
P = TypeVar("P", bound=Message)


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskStates:
    """The states of a resource while its task is waiting, while a worker has it, and once it has stopped on request."""

    queued: int
    begun: int
    cancelled: int


class FamilyTasks(Generic[M, P]):
    """The part of a `TaskHandler` that needs no knowledge of what the task does.

    It is that of tasks without checkpoints and rollouts, which are not paused.
    """

    def __init__(self, family: Family[M, P], states: TaskStates) -> None:
        self._family = family
        self._states = states

    async def started(self, connection: AsyncConnection, task: Task) -> None:
        """A worker began."""
        await self._move(connection, task, self._states.begun)

    async def waits(self, connection: AsyncConnection, task: Task, why: status_pb2.Status | None) -> None:
        """No worker is there for it, or one is again."""
        await self._family.show_waiting(connection, task.uid, why)

    async def lost(self, connection: AsyncConnection, task: Task) -> None:
        """Another worker will begin anew."""
        await self._move(connection, task, self._states.queued)

    async def cancelled(
        self, connection: AsyncConnection, task: Task, result: task_pb2.TaskResult | None
    ) -> None:
        """It stopped on request; what is known of it all the same is let go."""
        await self._move(connection, task, self._states.cancelled)

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
        """Nothing of a report is kept but its events."""

    async def checkpointed(
        self,
        connection: AsyncConnection,
        task: Task,
        step: int,
        files: Sequence[task_pb2.BlobFile],
        metrics: Mapping[str, float],
    ) -> str:
        """Refuse: there are no checkpoints. Raises FailedPrecondition."""
        raise FailedPrecondition(
            f"tasks of kind {task.kind} have no checkpoints", metadata={"task": task.task_id}
        )

    async def rolled_out(
        self,
        connection: AsyncConnection,
        task: Task,
        request: worker_service_pb2.CommitRolloutsRequest,
    ) -> None:
        """Refuse: nothing is drawn from a model and learnt from. Raises FailedPrecondition."""
        raise FailedPrecondition(
            f"tasks of kind {task.kind} have no rollouts", metadata={"task": task.task_id}
        )

    async def paused(self, connection: AsyncConnection, task: Task) -> None:
        """Refuse: there is nothing to go on from. Raises FailedPrecondition."""
        raise FailedPrecondition(
            f"tasks of kind {task.kind} cannot be paused", metadata={"task": task.task_id}
        )

    async def _move(self, connection: AsyncConnection, task: Task, state: int) -> None:
        await self._family.move(connection, await self._family.of_uid(connection, task.uid), state)
