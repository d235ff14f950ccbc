"""How models that are made from others follow their tasks."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy.ext.asyncio import AsyncConnection

from luthier.errors import Failure, InvalidArgument
from luthier.stored.v1.training_pb2 import ModelPrivate
from luthier.training.models.making import ModelMaking
from luthier.training.models.rules import MAKING_RESULT_LIMITS, State
from luthier.training.models.service import ModelService
from luthier.training.weights import StoredModel
from luthier.v1.model_pb2 import Model
from luthier.work.family_tasks import FamilyTasks, TaskStates
from luthier.work.tasks import Task, TaskKind
from luthier.worker.v1 import task_pb2

_STATES = TaskStates(queued=State.STATE_QUEUED, begun=State.STATE_MAKING, cancelled=State.STATE_CANCELLED)
KINDS: Sequence[TaskKind] = (TaskKind.MERGE, TaskKind.EXPORT)


class MakingHandler(FamilyTasks[Model, ModelPrivate]):
    """Follows MERGE and EXPORT tasks."""

    result_limits = MAKING_RESULT_LIMITS

    def __init__(self, models: ModelService, making: ModelMaking) -> None:
        super().__init__(models.family, _STATES)
        self._models = models
        self._making = making

    async def specify(self, connection: AsyncConnection, task: Task) -> task_pb2.Task:
        """Say what to merge, or to write."""
        stored = await self._models.family.of_uid(connection, task.uid)
        held_out = await self._making.held_out(connection, stored.message)
        if task.kind is TaskKind.EXPORT:
            export = task_pb2.ExportSpec(
                model_files=stored.private.source_files,
                adapter_files=stored.private.adapter_files,
                format=stored.message.export_format,
                title=_title(stored),
                held_out=held_out,
                base_precision=stored.private.base_precision,
                stop_token_ids=stored.message.taught.stop_token_ids,
            )
            return task_pb2.Task(export=export)
        merge = task_pb2.MergeSpec(
            base_model_files=stored.private.source_files,
            adapter_files=stored.private.adapter_files,
            held_out=held_out,
            base_precision=stored.private.base_precision,
        )
        return task_pb2.Task(merge=merge)

    async def succeeded(self, connection: AsyncConnection, task: Task, result: task_pb2.TaskResult) -> None:
        """The model is READY, or FAILED when the result is none."""
        try:
            if task.kind is TaskKind.EXPORT:
                await self._making.exported(connection, task.uid, result.export)
            else:
                await self._making.merged(connection, task.uid, result.merge)
        except InvalidArgument as error:
            await self._models.failed(connection, task.uid, Failure.of(error))

    async def failed(
        self,
        connection: AsyncConnection,
        task: Task,
        failure: Failure,
        result: task_pb2.TaskResult | None,  # noqa: ARG002 - as every handler is told
    ) -> None:
        """The model is FAILED."""
        await self._models.failed(connection, task.uid, failure)


def _title(stored: StoredModel) -> str:
    """Return the name that an exported file gives its model."""
    return stored.message.display_name or stored.message.start_from.rpartition("/")[2]
