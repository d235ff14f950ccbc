"""HoldService: other services hold resources of this one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Protocol

import grpc.aio
from google.protobuf.message import Message
from sqlalchemy.ext.asyncio import AsyncConnection

from luthier.errors import FieldViolation, InvalidArgument, NotFound
from luthier.runtime.policies import policy_for
from luthier.storage.database import Database
from luthier.work.holds import Holds
from luthier.worker.v1 import hold_service_pb2, hold_service_pb2_grpc

SERVICE = hold_service_pb2.DESCRIPTOR.services_by_name["HoldService"]
POLICY = policy_for(SERVICE, "service")
_HOLD = re.compile(r"[0-9a-f-]{36}")
_MOST_CHARACTERS = 1000
_MOST_SECONDS = 7 * 24 * 3600.0
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
        _require_valid(request, "hold", *(["uid"] if request.uid else []))
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
        _require_valid(request, "hold")
        async with self._database.transaction(makes_room=True) as connection:
            await self._holds.release(connection, request.hold)
        return hold_service_pb2.ReleaseHoldResponse()


def _require_valid(request: Message, *uuids: str) -> None:
    wrong = [
        FieldViolation(field=field, description=f"must be a UUID, got {getattr(request, field)!r}")
        for field in uuids
        if not _HOLD.fullmatch(getattr(request, field))
    ]
    if not 0 < getattr(request, "seconds", 1.0) <= _MOST_SECONDS:
        wrong.append(FieldViolation(field="seconds", description=f"must be in 0..{_MOST_SECONDS:g}, above 0"))
    if len(getattr(request, "holder", "")) > _MOST_CHARACTERS:
        wrong.append(
            FieldViolation(field="holder", description=f"must have at most {_MOST_CHARACTERS} characters")
        )
    if wrong:
        raise InvalidArgument.of_fields(*wrong)
