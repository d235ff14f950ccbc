"""What a resource family does with the tasks that work for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from google.rpc import status_pb2
from sqlalchemy.ext.asyncio import AsyncConnection

from luthier.errors.failure import Failure
from luthier.runtime.field_limits import LimitTable
from luthier.v1 import event_pb2, fine_tuning_job_pb2
from luthier.work.tasks import Task
from luthier.worker.v1 import task_pb2, worker_service_pb2


class TaskHandler(Protocol):
    """Follows the tasks of one kind.

    Every method runs inside the transaction that changes the task, so that the resource, its events and the
    queue never disagree. None of them may wait for another service.
    """

    @property
    def result_limits(self) -> LimitTable:
        """What a worker may say in a result of these tasks, each of its fields by path."""
        ...

    async def specify(self, connection: AsyncConnection, task: Task) -> task_pb2.Task:
        """Say what to do: a Task with nothing but its `spec` set."""
        ...

    async def started(self, connection: AsyncConnection, task: Task) -> None:
        """A worker claimed the task."""
        ...

    async def reporting(
        self, connection: AsyncConnection, task: Task, events: Sequence[event_pb2.Event]
    ) -> None:
        """A worker reports events, which will stand in the log as this leaves them."""
        ...

    async def reported(
        self,
        connection: AsyncConnection,
        task: Task,
        events: Sequence[event_pb2.Event],
        run_record: fine_tuning_job_pb2.RunRecord | None,
    ) -> None:
        """A worker reported events; they stand in the log already."""
        ...

    async def checkpointed(
        self,
        connection: AsyncConnection,
        task: Task,
        step: int,
        files: Sequence[task_pb2.BlobFile],
        metrics: Mapping[str, float],
    ) -> str:
        """Store and log a checkpoint, return its resource name. The same step again changes nothing."""
        ...

    async def rolled_out(
        self,
        connection: AsyncConnection,
        task: Task,
        request: worker_service_pb2.CommitRolloutsRequest,
    ) -> None:
        """Keep what a step drew, unless its blob is not there. The same again changes nothing."""
        ...

    async def succeeded(self, connection: AsyncConnection, task: Task, result: task_pb2.TaskResult) -> None:
        """The task did all its work."""
        ...

    async def failed(
        self,
        connection: AsyncConnection,
        task: Task,
        failure: Failure,
        result: task_pb2.TaskResult | None,
    ) -> None:
        """The task failed for good; `result` is what is known all the same."""
        ...

    async def cancelled(
        self, connection: AsyncConnection, task: Task, result: task_pb2.TaskResult | None
    ) -> None:
        """The task stopped on request, or was never begun; `result` is what is known all the same."""
        ...

    async def waits(self, connection: AsyncConnection, task: Task, why: status_pb2.Status | None) -> None:
        """No worker is there that the task can be given to; None: one is there again."""
        ...

    async def lost(self, connection: AsyncConnection, task: Task) -> None:
        """The attempt was lost and the task is queued again."""
        ...

    async def paused(self, connection: AsyncConnection, task: Task) -> None:
        """Nobody has the task, and nobody is given it until it is queued again. Of what may be paused alone."""
        ...
