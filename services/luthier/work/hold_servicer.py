"""HoldService: other services hold resources of this one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Protocol

import grpc.aio
from sqlalchemy.ext.asyncio import AsyncConnection

from luthier.errors import NotFound
from luthier.runtime.field_limits import (
    LimitTable,
    characters,
    demanded,
    limit_violations,
    matching,
    positive,
    refuse,
)
from luthier.runtime.policies import policy_for
from luthier.storage.database import Database
from luthier.work.holds import Holds
from luthier.worker.v1 import hold_service_pb2, hold_service_pb2_grpc

SERVICE = hold_service_pb2.DESCRIPTOR.services_by_name["HoldService"]
POLICY = policy_for(SERVICE, "service")
_UUID = matching(re.compile(r"[0-9a-f-]{36}"), "a UUID")
_OF_RELEASE: LimitTable = {"hold": demanded(_UUID)}
_OF_CREATE: LimitTable = {
    **_OF_RELEASE,
    "uid": _UUID,
    "holder": characters(1000),
    "seconds": demanded(positive(7 * 24 * 3600.0)),
}
Context = grpc.aio.ServicerContext[Any, Any]


class Held(Protocol):
    """What is held."""

    @property
    def uid(self) -> str:
        """Its uid."""


class Holdable(Protocol):
    """Resources of one collection that other services may hold."""

    async def find(self, connection: AsyncConnection, name: str, /) -> Held | None:
        """Return a resource as a transaction sees it, None when there is none of this name."""
        ...


class HoldServicer(hold_service_pb2_grpc.HoldServiceServicer):
    """HoldService over the families of one service, by the ids of their collections."""

    def __init__(self, database: Database, families: Mapping[str, Holdable]) -> None:
        self._database = database
        self._families = families
        self._holds = Holds()

    async def CreateHold(
        self, request: hold_service_pb2.CreateHoldRequest, context: Context
    ) -> hold_service_pb2.CreateHoldResponse:
        """Hold a resource."""
        refuse(limit_violations(request, _OF_CREATE))
        async with self._database.transaction(makes_room=True) as connection:
            rows = self._families.get(request.name.split("/")[-2] if "/" in request.name else "")
            held = await rows.find(connection, request.name) if rows is not None else None
            if held is None or request.uid not in ("", held.uid):
                raise NotFound(
                    f"{request.name} with uid {request.uid} does not exist", metadata={"name": request.name}
                )
            await self._holds.set(connection, held.uid, request.hold, request.holder, request.seconds)
        return hold_service_pb2.CreateHoldResponse(uid=held.uid)

    async def ReleaseHold(
        self, request: hold_service_pb2.ReleaseHoldRequest, context: Context
    ) -> hold_service_pb2.ReleaseHoldResponse:
        """Let a resource go."""
        refuse(limit_violations(request, _OF_RELEASE))
        async with self._database.transaction(makes_room=True) as connection:
            await self._holds.release(connection, request.hold)
        return hold_service_pb2.ReleaseHoldResponse()
