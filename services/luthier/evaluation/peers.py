"""The Data and Model services as the Evaluation service sees them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import grpc
import grpc.aio

from luthier.errors import NotFound
from luthier.evaluation.asking import Taught
from luthier.evaluation.evaluations.service import ModelFacts, VersionFacts
from luthier.runtime.auth import TaskTokens
from luthier.runtime.names import project_of
from luthier.v1 import (
    data_service_pb2,
    data_service_pb2_grpc,
    dataset_pb2,
    model_pb2,
    model_service_pb2,
    model_service_pb2_grpc,
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

    async def version(self, name: str) -> VersionFacts:
        """Return a dataset version. Raises NotFound, and Unavailable when the Data service is away."""
        request = data_service_pb2.GetDatasetVersionRequest(name=name)
        version = await self._ask(self._data.GetDatasetVersion, request, "the Data service")
        return VersionFacts(
            name=name,
            ready=version.state == dataset_pb2.DatasetVersion.STATE_READY,
            state=dataset_pb2.DatasetVersion.State.Name(version.state).removeprefix("STATE_"),
            digest=version.digest,
            num_records={
                dataset_pb2.Split.Name(split.split).removeprefix("SPLIT_"): split.num_records
                for split in version.statistics.splits
            },
        )

    async def model(self, name: str) -> ModelFacts:
        """Return a model. Raises NotFound, and Unavailable when the Training service is away."""
        request = model_service_pb2.GetModelRequest(name=name)
        model = await self._ask(self._models.GetModel, request, "the Training service")
        return ModelFacts(
            name=name,
            ready=model.state == model_pb2.Model.STATE_READY,
            state=model_pb2.Model.State.Name(model.state).removeprefix("STATE_"),
            digest=model.digest,
            base_model=model.base_model,
            has_chat_template=model.has_chat_template,
            taught=await self._taught(model),
            eos_token_ids=tuple(model.eos_token_ids),
        )

    async def _taught(self, model: model_pb2.Model) -> Taught | None:
        """Return how a tuned model was taught: as it says, or else as its job's rendering still says."""
        if model.HasField("taught"):
            return _taught_of(model.taught)
        if not model.fine_tuning_job:
            return None
        try:
            wanted = training_service_pb2.GetFineTuningJobRequest(name=model.fine_tuning_job)
            job = await self._ask(self._jobs.GetFineTuningJob, wanted, "the Training service")
            request = data_service_pb2.GetRenderingRequest(name=job.rendering)
            rendering = await self._ask(self._data.GetRendering, request, "the Data service")
        except NotFound:
            return None
        if rendering.digest != job.run_record.rendering_digest:
            return None
        return _taught_of(
            model_pb2.Taught(
                chat_template=rendering.effective_chat_template or rendering.chat_template,
                template_date=rendering.template_date,
                prefix_token_ids=rendering.prefix_token_ids,
                stop_token_ids=rendering.stop_token_ids,
            )
        )

    async def _ask(self, method: Callable[..., Awaitable[T]], request: Any, peer: str) -> T:
        token = self._task_tokens.mint(
            project_of(request.name), (request.name,), 0, "evaluation-service", _TOKEN_SECONDS
        )
        try:
            return await method(request, metadata=bearer(token), timeout=_CALL_SECONDS)
        except grpc.aio.AioRpcError as error:
            raise service_error_of(error, peer) from error


def _taught_of(message: model_pb2.Taught) -> Taught:
    # What was taught before these tokens were kept says none of them.
    known = bool(message.stop_token_ids or message.prefix_token_ids)
    return Taught(
        chat_template=message.chat_template,
        template_date=message.template_date,
        prefix_token_ids=tuple(message.prefix_token_ids) if known else None,
        stop_token_ids=tuple(message.stop_token_ids),
    )
