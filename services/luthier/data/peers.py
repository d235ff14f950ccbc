"""The services that the Data service calls: Models."""

from __future__ import annotations

import grpc.aio

from luthier.errors import NotFound, Reason
from luthier.runtime.auth import TaskTokens
from luthier.runtime.names import project_of
from luthier.v1 import model_pb2, model_service_pb2, model_service_pb2_grpc
from luthier.work.peers import bearer, service_error_of

_CALL_SECONDS = 10.0
_TOKEN_SECONDS = 60.0


class ModelPeer:
    """Asks ModelService about models, with a token that may read the one model and nothing else."""

    def __init__(self, channel: grpc.aio.Channel, task_tokens: TaskTokens) -> None:
        self._stub = model_service_pb2_grpc.ModelServiceStub(channel)
        self._task_tokens = task_tokens

    async def get(self, name: str) -> model_pb2.Model:
        """Return a model. Raises NotFound BASE_MODEL_MISSING; Unavailable when the service is away."""
        token = self._task_tokens.mint(
            project=project_of(name),
            resources=(name,),
            epoch=0,
            task="data-service",
            lifetime_seconds=_TOKEN_SECONDS,
        )
        request = model_service_pb2.GetModelRequest(name=name)
        try:
            model: model_pb2.Model = await self._stub.GetModel(
                request, metadata=bearer(token), timeout=_CALL_SECONDS
            )
        except grpc.aio.AioRpcError as error:
            told = service_error_of(error, "the Training service")
            if isinstance(told, NotFound):
                raise NotFound(
                    f"rendering.model: {name} does not exist; register it with RegisterBaseModel first",
                    reason=Reason.BASE_MODEL_MISSING,
                    metadata={"name": name},
                ) from error
            raise told from error
        return model
