"""ModelService on the wire, and its side of the worker protocol."""

from __future__ import annotations

from collections.abc import AsyncIterator, Container, Mapping, Sequence
from typing import Any

import grpc.aio
from sqlalchemy.ext.asyncio import AsyncConnection

from luthier.errors import FailedPrecondition, Failure, LuthierError, Reason
from luthier.runtime.auth import Kind
from luthier.runtime.names import require_project
from luthier.runtime.paging import MAX_PAGE_SIZE, PageTokens, fingerprint, page_size
from luthier.training.models.convert import (
    file_to_proto,
    model_to_proto,
    new_base_model,
    outcome_from_proto,
    register_spec,
)
from luthier.training.models.service import ModelService
from luthier.training.names import MODEL, check_name
from luthier.v1 import event_pb2, fine_tuning_job_pb2, model_pb2, model_service_pb2, model_service_pb2_grpc
from luthier.work.events import Entry
from luthier.work.listing import page_that_fits
from luthier.work.log import EventLog
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

add_to_server = model_service_pb2_grpc.add_ModelServiceServicer_to_server


class ModelServicer(model_service_pb2_grpc.ModelServiceServicer):
    """Translates, delegates, translates."""

    def __init__(
        self, models: ModelService, log: EventLog, page_tokens: PageTokens, projects: Container[str]
    ) -> None:
        self._models = models
        self._log = log
        self._page_tokens = page_tokens
        self._projects = projects

    async def RegisterBaseModel(
        self, request: model_service_pb2.RegisterBaseModelRequest, context: Context
    ) -> model_pb2.Model:
        """Queue the registration of a base model."""
        require_project(request.parent, self._projects)
        new = new_base_model(request.model)
        return model_to_proto(await self._models.register(request.parent, request.model_id, new))

    async def GetModel(self, request: model_service_pb2.GetModelRequest, context: Context) -> model_pb2.Model:
        """Read one model."""
        check_name(MODEL, request.name, self._projects)
        return model_to_proto(await self._models.get(request.name))

    async def ListModels(
        self, request: model_service_pb2.ListModelsRequest, context: Context
    ) -> model_service_pb2.ListModelsResponse:
        """Page through models; a page of great ones holds fewer."""
        require_project(request.parent, self._projects)
        return await page_that_fits(request, self._models_page)

    async def _models_page(
        self, request: model_service_pb2.ListModelsRequest
    ) -> tuple[model_service_pb2.ListModelsResponse, int]:
        values, token = await self._models.list_page(request, self._page_tokens)
        page = model_service_pb2.ListModelsResponse(
            models=[model_to_proto(value) for value in values], next_page_token=token
        )
        return page, len(values)

    async def WatchModel(
        self, request: model_service_pb2.WatchModelRequest, context: Context
    ) -> AsyncIterator[event_pb2.Event]:
        """Stream a model's events."""
        check_name(MODEL, request.name, self._projects)
        await self._models.get(request.name)
        async for event in self._log.watch(request.name, request.start_sequence):
            yield event

    async def ListModelFiles(
        self, request: model_service_pb2.ListModelFilesRequest, context: Context
    ) -> model_service_pb2.ListModelFilesResponse:
        """Page through a model's files."""
        check_name(MODEL, request.parent, self._projects, field="parent")
        limit = page_size(request.page_size, default=MAX_PAGE_SIZE)
        bound = fingerprint("ListModelFiles", request.parent)
        after = (self._page_tokens.decode(request.page_token, bound) or ("",))[0]
        files = await self._models.files(request.parent, after, limit + 1)
        page = model_service_pb2.ListModelFilesResponse(files=[file_to_proto(file) for file in files[:limit]])
        if len(files) > limit:
            page.next_page_token = self._page_tokens.encode((files[limit - 1].path,), bound)
        return page

    async def DownloadModelFile(
        self, request: model_service_pb2.DownloadModelFileRequest, context: Context
    ) -> AsyncIterator[model_service_pb2.DownloadModelFileResponse]:
        """Stream one file."""
        check_name(MODEL, request.name, self._projects)
        offset = request.start_offset
        async for data in await self._models.read_file(request.name, request.path, offset):
            yield model_service_pb2.DownloadModelFileResponse(offset=offset, data=data)
            offset += len(data)


class RegisterModelHandler:
    """Follows REGISTER_MODEL tasks."""

    def __init__(self, models: ModelService) -> None:
        self._models = models

    async def specify(self, connection: AsyncConnection, task: Task) -> task_pb2.Task:
        """Say what to register."""
        return register_spec(await self._models.to_register(connection, task.subject))

    async def started(self, connection: AsyncConnection, task: Task) -> None:
        """A worker began."""
        await self._models.started(connection, task.subject)

    async def reported(
        self,
        connection: AsyncConnection,
        task: Task,
        entries: Sequence[Entry],
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
        """Refuse: a registration has no checkpoints."""
        raise FailedPrecondition(f"a {task.kind} task has no checkpoints", metadata={"task": task.task_id})

    async def succeeded(self, connection: AsyncConnection, task: Task, result: task_pb2.TaskResult) -> None:
        """The model is READY, or FAILED when the result contradicts itself."""
        try:
            outcome = outcome_from_proto(result.register_model)
        except LuthierError as error:
            await self._models.failed(connection, task.subject, Failure.of(error))
            return
        await self._models.registered(connection, task.subject, outcome)

    async def failed(
        self,
        connection: AsyncConnection,
        task: Task,
        failure: Failure,
        result: task_pb2.TaskResult | None,
    ) -> None:
        """The model is FAILED."""
        await self._models.failed(connection, task.subject, failure)

    async def cancelled(
        self, connection: AsyncConnection, task: Task, result: task_pb2.TaskResult | None
    ) -> None:
        """The model is FAILED."""
        stopped = Failure(
            code="CANCELLED",
            reason=Reason.CANCELLED_BY_USER,
            message=f"the registration of {task.subject} was stopped on request",
        )
        await self._models.failed(connection, task.subject, stopped)

    async def lost(self, connection: AsyncConnection, task: Task) -> None:
        """Another worker will begin anew."""
        await self._models.lost(connection, task.subject)
