"""Health checks, from callers without a key: watches that end, and errors of our tree."""

from __future__ import annotations

import asyncio
from typing import Any

from grpc import aio
from grpc_health.v1 import health_pb2
from grpc_health.v1._async import HealthServicer

from luthier.errors import NotFound

WATCH_SECONDS = 600.0
Context = aio.ServicerContext[Any, Any]


class Health(HealthServicer):  # type: ignore[misc] # grpc_health has no types
    """What gRPC's own servicer says, about the services of this process."""

    def __init__(self, *, watch_seconds: float = WATCH_SECONDS) -> None:
        super().__init__()
        self._watch_seconds = watch_seconds

    async def Check(  # noqa: N802 - named by the protocol
        self,
        request: health_pb2.HealthCheckRequest,
        context: Context,  # noqa: ARG002
    ) -> health_pb2.HealthCheckResponse:
        """Say how one service is. Raises NotFound for one that this process does not have."""
        status = self._server_status.get(request.service)
        if status is None:
            known = ", ".join(name for name in self._server_status if name)
            raise NotFound(f"this process has no service {request.service[:200]!r}; it has {known}")
        return health_pb2.HealthCheckResponse(status=status)

    async def List(  # noqa: N802
        self,
        request: health_pb2.HealthListRequest,  # noqa: ARG002
        context: Context,  # noqa: ARG002
    ) -> health_pb2.HealthListResponse:
        """Say how every service is."""
        statuses = {
            name: health_pb2.HealthCheckResponse(status=status)
            for name, status in self._server_status.items()
        }
        return health_pb2.HealthListResponse(statuses=statuses)

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Context) -> None:  # noqa: N802
        """Say how one service is, and each change, for at most `watch_seconds`: slots of this kind are few."""
        try:
            async with asyncio.timeout(self._watch_seconds):
                await super().Watch(request, context)
        except TimeoutError:
            return
