"""ModelService on the wire, and its side of the worker protocol."""

from __future__ import annotations

from collections.abc import AsyncIterator, Container
from typing import Any

import grpc.aio
from sqlalchemy.ext.asyncio import AsyncConnection

from luthier.errors import Failure, InvalidArgument
from luthier.runtime.auth import Kind
from luthier.runtime.names import check_name, require_project
from luthier.runtime.paging import MAX_PAGE_SIZE, PageTokens, fingerprint, page_size
from luthier.runtime.server import Registration, of_families
from luthier.stored.v1.training_pb2 import ModelPrivate
from luthier.training.models.rules import RESULT_LIMITS, State
from luthier.training.models.service import ModelService
from luthier.training.names import MODEL
from luthier.v1 import model_pb2, model_service_pb2, model_service_pb2_grpc
from luthier.v1.model_pb2 import Model
from luthier.work.family_tasks import FamilyTasks, TaskStates
from luthier.work.standard_methods import StandardMethods
from luthier.work.tasks import Task
from luthier.worker.v1 import task_pb2

Context = grpc.aio.ServicerContext[Any, Any]
SERVICE = model_service_pb2.DESCRIPTOR.services_by_name["ModelService"]
_FOR_TASKS = frozenset({"GetModel", "ListModelFiles", "DownloadModelFile"})
_KEY: frozenset[Kind] = frozenset({"key"})
_KEY_OR_TASK: frozenset[Kind] = frozenset({"key", "task"})
POLICY = {
    f"/{SERVICE.full_name}/{method.name}": _KEY_OR_TASK if method.name in _FOR_TASKS else _KEY
    for method in SERVICE.methods
}


class ModelServicer:
    """ModelService."""

    def __init__(self, models: ModelService, page_tokens: PageTokens, projects: Container[str]) -> None:
        self._models = models
        self._page_tokens = page_tokens
        self._projects = projects
        family = models.family
        standard = StandardMethods(pattern=MODEL, tokens=page_tokens, projects=projects)
        self.GetModel = standard.get(family.message)
        self.ListModels = standard.list(
            models.list_page,
            lambda found, token: model_service_pb2.ListModelsResponse(models=found, next_page_token=token),
        )
        self.CancelModel = standard.cancel(family.cancel)
        self.DeleteModel = standard.delete(family.delete)
        self.WatchModel = standard.watch(family.watch)

    async def RegisterBaseModel(
        self, request: model_service_pb2.RegisterBaseModelRequest, context: Context
    ) -> model_pb2.Model:
        """Queue the registration of a base model."""
        require_project(request.parent, self._projects)
        return await self._models.register(request)

    async def ListModelFiles(
        self, request: model_service_pb2.ListModelFilesRequest, context: Context
    ) -> model_service_pb2.ListModelFilesResponse:
        """Page through a model's files."""
        check_name(MODEL, request.parent, self._projects, field="parent")
        limit = page_size(request.page_size, default=MAX_PAGE_SIZE)
        model = await self._models.ready(request.parent)
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
        check_name(MODEL, request.name, self._projects)
        offset = request.start_offset
        async for data in await self._models.read_file(request.name, request.path, offset, request.uid):
            yield model_service_pb2.DownloadModelFileResponse(offset=offset, data=data)
            offset += len(data)


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
