"""The Data and Model services as the Evaluation service sees them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import grpc
import grpc.aio

from luthier.errors import NotFound
from luthier.runtime.auth import TaskTokens
from luthier.runtime.names import project_of
from luthier.v1 import (
    data_service_pb2,
    data_service_pb2_grpc,
    dataset_pb2,
    fine_tuning_job_pb2,
    model_pb2,
    model_service_pb2,
    model_service_pb2_grpc,
    rendering_pb2,
    training_service_pb2,
    training_service_pb2_grpc,
)
from luthier.work.peers import bearer, service_error_of

T = TypeVar("T")
_CALL_SECONDS = 10.0
_TOKEN_SECONDS = 60.0


class GrpcPeers:
    """Asks the other services over gRPC, with a token for the one resource it asks about."""

    def __init__(self, data: grpc.aio.Channel, models: grpc.aio.Channel, task_tokens: TaskTokens) -> None:
        self._data = data_service_pb2_grpc.DataServiceStub(data)
        self._models = model_service_pb2_grpc.ModelServiceStub(models)
        self._jobs = training_service_pb2_grpc.TrainingServiceStub(models)
        self._task_tokens = task_tokens

    async def version(self, name: str) -> dataset_pb2.DatasetVersion:
        """Return a dataset version. Raises NotFound, and Unavailable when the Data service is away."""
        request = data_service_pb2.GetDatasetVersionRequest(name=name)
        version: dataset_pb2.DatasetVersion = await self._ask(
            self._data.GetDatasetVersion, request, "the Data service"
        )
        return version

    async def rendering(self, name: str) -> rendering_pb2.Rendering:
        """Return a rendering. Raises NotFound, and Unavailable when the Data service is away."""
        request = data_service_pb2.GetRenderingRequest(name=name)
        rendering: rendering_pb2.Rendering = await self._ask(
            self._data.GetRendering, request, "the Data service"
        )
        return rendering

    async def job(self, name: str) -> fine_tuning_job_pb2.FineTuningJob:
        """Return a job. Raises NotFound, and Unavailable when the Training service is away."""
        request = training_service_pb2.GetFineTuningJobRequest(name=name)
        job: fine_tuning_job_pb2.FineTuningJob = await self._ask(
            self._jobs.GetFineTuningJob, request, "the Training service"
        )
        return job

    async def model(self, name: str) -> model_pb2.Model:
        """Return a model; one that does not say how it was taught says it as its job's rendering still does.

        Raises NotFound, and Unavailable when the Training service is away.
        """
        request = model_service_pb2.GetModelRequest(name=name)
        model: model_pb2.Model = await self._ask(self._models.GetModel, request, "the Training service")
        if not model.HasField("taught") and model.fine_tuning_job:
            uids = {reference.name: reference.uid for reference in model.references}
            taught = await self._taught_by(model.fine_tuning_job, uids.get(model.fine_tuning_job, ""))
            if taught is not None:
                model.taught.CopyFrom(taught)
        return model

    async def _taught_by(self, job_name: str, job_uid: str) -> model_pb2.Taught | None:
        """Return what a job taught, as its rendering still says; None when one of them is gone or another one."""
        try:
            job = await self.job(job_name)
            if job.uid != job_uid:
                return None
            rendering = await self.rendering(job.rendering)
        except NotFound:
            return None
        if rendering.digest != job.run_record.rendering_digest:
            return None
        return model_pb2.Taught(
            chat_template=rendering.effective_chat_template or rendering.chat_template,
            template_date=rendering.template_date,
            prefix_token_ids=rendering.prefix_token_ids,
            stop_token_ids=rendering.stop_token_ids,
        )

    async def _ask(self, method: Callable[..., Awaitable[T]], request: Any, peer: str) -> T:
        token = self._task_tokens.mint(
            project_of(request.name), (request.name,), 0, "evaluation-service", _TOKEN_SECONDS
        )
        try:
            return await method(request, metadata=bearer(token), timeout=_CALL_SECONDS)
        except grpc.aio.AioRpcError as error:
            raise service_error_of(error, peer) from error
