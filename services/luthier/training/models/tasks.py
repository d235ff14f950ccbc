"""How models that are made from others follow their tasks."""

from __future__ import annotations

from sqlalchemy.ext.asyncio import AsyncConnection

from luthier.errors import Failure, InvalidArgument
from luthier.stored.v1.training_pb2 import ModelPrivate
from luthier.training.models.making import ModelMaking
from luthier.training.models.rules import EXPORT_RESULT_LIMITS, MERGE_RESULT_LIMITS, State
from luthier.training.models.service import ModelService
from luthier.v1.model_pb2 import Model
from luthier.work.family_tasks import FamilyTasks, TaskStates
from luthier.work.tasks import Task
from luthier.worker.v1 import task_pb2

_STATES = TaskStates(queued=State.STATE_QUEUED, begun=State.STATE_MAKING, cancelled=State.STATE_CANCELLED)


class MergeHandler(FamilyTasks[Model, ModelPrivate]):
    """Follows MERGE tasks."""

    result_limits = MERGE_RESULT_LIMITS

    def __init__(self, models: ModelService, making: ModelMaking) -> None:
        super().__init__(models.family, _STATES)
        self._models = models
        self._making = making

    async def specify(self, connection: AsyncConnection, task: Task) -> task_pb2.Task:
        """Say what to merge."""
        stored = await self._models.family.of_uid(connection, task.uid)
        spec = task_pb2.MergeSpec(
            base_model_files=stored.private.source_files,
            adapter_files=stored.private.adapter_files,
            held_out=await self._making.held_out(connection, stored.message),
        )
        return task_pb2.Task(merge=spec)

    async def succeeded(self, connection: AsyncConnection, task: Task, result: task_pb2.TaskResult) -> None:
        """The model is READY, or FAILED when the result is none."""
        try:
            await self._making.merged(connection, task.uid, result.merge)
        except InvalidArgument as error:
            await self._models.failed(connection, task.uid, Failure.of(error))

    async def failed(
        self,
        connection: AsyncConnection,
        task: Task,
        failure: Failure,
        result: task_pb2.TaskResult | None,
    ) -> None:
        """The model is FAILED."""
        await self._models.failed(connection, task.uid, failure)


class ExportHandler(FamilyTasks[Model, ModelPrivate]):
    """Follows EXPORT tasks."""

    result_limits = EXPORT_RESULT_LIMITS

    def __init__(self, models: ModelService, making: ModelMaking) -> None:
        super().__init__(models.family, _STATES)
        self._models = models
        self._making = making

    async def specify(self, connection: AsyncConnection, task: Task) -> task_pb2.Task:
        """Say what to write."""
        stored = await self._models.family.of_uid(connection, task.uid)
        spec = task_pb2.ExportSpec(
            model_files=stored.private.source_files,
            adapter_files=stored.private.adapter_files,
            format=stored.message.export_format,
            title=stored.message.display_name or stored.message.start_from.rpartition("/")[2],
            held_out=await self._making.held_out(connection, stored.message),
        )
        return task_pb2.Task(export=spec)

    async def succeeded(self, connection: AsyncConnection, task: Task, result: task_pb2.TaskResult) -> None:
        """The model is READY."""
        await self._making.exported(connection, task.uid, result.export)

    async def failed(
        self,
        connection: AsyncConnection,
        task: Task,
        failure: Failure,
        result: task_pb2.TaskResult | None,
    ) -> None:
        """The model is FAILED."""
        await self._models.failed(connection, task.uid, failure)
