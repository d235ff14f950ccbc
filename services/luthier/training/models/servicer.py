"""ModelService on the wire, and its side of the worker protocol."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, Protocol

import grpc.aio
from sqlalchemy.ext.asyncio import AsyncConnection

from luthier.errors import Failure, InvalidArgument
from luthier.runtime.names import PROJECT
from luthier.runtime.paging import MAX_PAGE_SIZE, PageTokens, fingerprint, page_size
from luthier.runtime.policies import policy_of
from luthier.runtime.server import Registration, of_families
from luthier.stored.v1.training_pb2 import ModelPrivate
from luthier.training.models.making import ModelMaking
from luthier.training.models.rules import RESULT_LIMITS, State
from luthier.training.models.service import ModelService
from luthier.training.names import MODEL, WEIGHTS, is_checkpoint
from luthier.training.weights import SeenModel, StoredModel
from luthier.v1 import model_pb2, model_service_pb2, model_service_pb2_grpc
from luthier.v1.model_pb2 import Model
from luthier.work.family_tasks import FamilyTasks, TaskStates
from luthier.work.standard_methods import StandardMethods
from luthier.work.tasks import Task
from luthier.worker.v1 import task_pb2

Context = grpc.aio.ServicerContext[Any, Any]
SERVICE = model_service_pb2.DESCRIPTOR.services_by_name["ModelService"]
POLICY = policy_of(
    SERVICE,
    reads=("GetModel", "ListModels", "WatchModel", "ListModelFiles", "DownloadModelFile"),
    changes=(
        "RegisterBaseModel",
        "MergeModel",
        "ExportModel",
        "CancelModel",
        "DeleteModel",
        "UndeleteModel",
        "PurgeModel",
    ),
    tasks=("GetModel", "ListModelFiles", "DownloadModelFile"),
)


class CheckpointModels(Protocol):
    """What this family needs of checkpoints: the two meet where the service is put together."""

    async def read(self, name: str, uid: str = "") -> SeenModel:
        """Return a checkpoint as the model that it would be, the one of a uid if that is given. Raises NotFound."""
        ...


class ModelServicer:
    """ModelService."""

    def __init__(
        self,
        models: ModelService,
        making: ModelMaking,
        checkpoints: CheckpointModels,
        page_tokens: PageTokens,
    ) -> None:
        self._models = models
        self._making = making
        self._checkpoints = checkpoints
        self._page_tokens = page_tokens
        family = models.family
        standard = StandardMethods(pattern=MODEL, tokens=page_tokens)
        self.ListModels = standard.list(
            models.list_page,
            lambda found, token: model_service_pb2.ListModelsResponse(models=found, next_page_token=token),
        )
        self.CancelModel = standard.cancel(family.cancel)
        self.DeleteModel = standard.delete(family.delete)
        self.UndeleteModel = standard.undelete(family.undeleting)
        self.PurgeModel = standard.purge(family.undeleting)
        self.WatchModel = standard.watch(family.watch)

    async def RegisterBaseModel(
        self, request: model_service_pb2.RegisterBaseModelRequest, context: Context
    ) -> model_pb2.Model:
        """Queue the registration of a base model."""
        PROJECT.parse(request.parent, field="parent")
        return await self._models.register(request)

    async def MergeModel(
        self, request: model_service_pb2.MergeModelRequest, context: Context
    ) -> model_pb2.Model:
        """Queue the merge of an adapter."""
        WEIGHTS.parse(request.name)
        return await self._making.merge(request)

    async def ExportModel(
        self, request: model_service_pb2.ExportModelRequest, context: Context
    ) -> model_pb2.Model:
        """Queue the writing of a model in another form."""
        WEIGHTS.parse(request.name)
        return await self._making.export(request)

    async def GetModel(self, request: model_service_pb2.GetModelRequest, context: Context) -> model_pb2.Model:
        """Read one model, or a checkpoint as the model that it would be."""
        WEIGHTS.parse(request.name)
        if is_checkpoint(request.name):
            return (await self._checkpoints.read(request.name)).message
        return await self._models.family.message(request.name)

    async def ListModelFiles(
        self, request: model_service_pb2.ListModelFilesRequest, context: Context
    ) -> model_service_pb2.ListModelFilesResponse:
        """Page through the files of a model or a checkpoint."""
        WEIGHTS.parse(request.parent, field="parent")
        limit = page_size(request.page_size, default=MAX_PAGE_SIZE)
        model = await self._ready(request.parent)
        bound = fingerprint("ListModelFiles", model.uid)
        after = (self._page_tokens.decode(request.page_token, bound) or ("",))[0]
        files = [file for file in model.private.files if file.path > after][: limit + 1]
        page = model_service_pb2.ListModelFilesResponse(files=files[:limit])
        if len(files) > limit:
            page.next_page_token = self._page_tokens.encode((files[limit - 1].path,), bound)
        return page

    async def DownloadModelFile(
        self, request: model_service_pb2.DownloadModelFileRequest, context: Context
    ) -> AsyncIterator[model_service_pb2.DownloadModelFileResponse]:
        """Stream one file."""
        WEIGHTS.parse(request.name)
        offset = request.start_offset
        model = await self._ready(request.name, request.uid)
        async for data in self._models.read_file(model, request.path, offset):
            yield model_service_pb2.DownloadModelFileResponse(offset=offset, data=data)
            offset += len(data)

    async def _ready(self, name: str, uid: str = "") -> SeenModel | StoredModel:
        return await (self._checkpoints.read if is_checkpoint(name) else self._models.ready)(name, uid)


def registration(models: ModelServicer) -> Registration:
    """Return how to add the service to a server."""
    add = model_service_pb2_grpc.add_ModelServiceServicer_to_server
    return of_families(SERVICE, add, (models,))


class RegisterModelHandler(FamilyTasks[Model, ModelPrivate]):
    """Follows REGISTER_MODEL tasks."""

    result_limits = RESULT_LIMITS

    def __init__(self, models: ModelService) -> None:
        states = TaskStates(
            queued=State.STATE_QUEUED, begun=State.STATE_REGISTERING, cancelled=State.STATE_CANCELLED
        )
        super().__init__(models.family, states)
        self._models = models

    async def specify(self, connection: AsyncConnection, task: Task) -> task_pb2.Task:
        """Say what to register."""
        model = (await self._models.family.of_uid(connection, task.uid)).message
        source = model.WhichOneof("source")
        assert source is not None, f"{model.name} has no source to register"
        spec = task_pb2.RegisterModelSpec(**{source: getattr(model, source)})
        return task_pb2.Task(register_model=spec)

    async def succeeded(self, connection: AsyncConnection, task: Task, result: task_pb2.TaskResult) -> None:
        """The model is READY, or FAILED when the result contradicts itself."""
        try:
            await self._models.registered(connection, task.uid, result.register_model)
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
