"""What resources of this service need at other services, held there for as long as it is needed.

A hold is taken before the resource that needs it is stored, for a short time; from then on a row says that it is
needed, and `sweep` prolongs it. When the need is over the row says so, in the transaction that ends it, and `sweep`
releases the hold. A service that dies in between, or a peer that is away, only makes that later.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import grpc
import grpc.aio
from sqlalchemy import delete, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from luthier.errors import LuthierError, NotFound
from luthier.runtime.auth import TaskTokens
from luthier.runtime.names import project_of
from luthier.storage.database import Database
from luthier.storage.stored import Stored
from luthier.v1.reference_pb2 import Reference
from luthier.work.peers import bearer, service_error_of
from luthier.work.schema import held_elsewhere
from luthier.worker.v1 import hold_service_pb2, hold_service_pb2_grpc

HOLDER = "holds"
"""Task that a service's own tokens for holds name; no worker's token does."""
TAKEN_SECONDS = 600.0
KEPT_SECONDS = 24 * 3600.0
RENEW_SECONDS = 1800.0
_CALL_SECONDS = 10.0
_TOKEN_SECONDS = 60.0
_AT_A_TIME = 200
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hold:
    """A hold on a resource of another service: its id, what it holds, and for whom."""

    hold: str
    name: str
    uid: str
    holder: str


class Keeper(Protocol):
    """A service that holds its resources for others."""

    async def keep(self, hold: Hold, seconds: float) -> None:
        """Hold for so long from now. Raises NotFound, and Unavailable when the service is away."""
        ...

    async def release(self, hold: Hold) -> None:
        """Let go. Raises Unavailable when the service is away."""
        ...


class GrpcKeeper:
    """Another service, over gRPC, called with a token for just the one resource."""

    def __init__(self, channel: grpc.aio.Channel, tokens: TaskTokens, peer: str) -> None:
        self._stub: Any = hold_service_pb2_grpc.HoldServiceStub(channel)
        self._tokens = tokens
        self._peer = peer

    async def keep(self, hold: Hold, seconds: float) -> None:
        """Hold for so long from now. Raises NotFound, and Unavailable when the service is away."""
        request = hold_service_pb2.CreateHoldRequest(
            name=hold.name, uid=hold.uid, hold=hold.hold, holder=hold.holder
        )
        request.expire_time.FromMicroseconds(round((time.time() + seconds) * 1e6))
        await self._call(self._stub.CreateHold, request)

    async def release(self, hold: Hold) -> None:
        """Let go. Raises Unavailable when the service is away."""
        request = hold_service_pb2.ReleaseHoldRequest(name=hold.name, hold=hold.hold)
        await self._call(self._stub.ReleaseHold, request)

    async def _call(self, method: Any, request: Any) -> None:
        token = self._tokens.mint(project_of(request.name), (request.name,), 0, HOLDER, _TOKEN_SECONDS)
        try:
            await method(request, metadata=bearer(token), timeout=_CALL_SECONDS)
        except grpc.aio.AioRpcError as error:
            raise service_error_of(error, self._peer) from error


class Elsewhere:
    """The holds that resources of this service have at others."""

    def __init__(
        self,
        database: Database,
        keepers: Mapping[str, Keeper],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Args: where rows are, and who keeps the resources of a collection, by its id: renderings."""
        self._database = database
        self._keepers = keepers
        self._clock = clock
        self._renewed: dict[str, float] = {}

    @asynccontextmanager
    async def holding(self, holder: str, needed: Iterable[Reference]) -> AsyncIterator[Sequence[Hold]]:
        """Hold what a resource of the name `holder` needs, for a block that stores it by `Family.add`.

        When the block fails, they are let go. Raises NotFound for what is deleted meanwhile, and Unavailable.
        """
        holds = [
            Hold(hold=str(uuid.uuid4()), name=one.name, uid=one.uid, holder=holder)
            for one in {reference.name: reference for reference in needed}.values()
        ]
        taken: list[Hold] = []
        try:
            for hold in holds:
                await self._keeper(hold).keep(hold, TAKEN_SECONDS)
                taken.append(hold)
            yield holds
        except BaseException:
            for hold in taken:
                await self._let_go(hold)
            raise

    async def sweep(self) -> None:
        """Release what is not needed any more, and prolong what still is."""
        async with self._database.reading() as connection:
            released = select(held_elsewhere).where(held_elsewhere.c.released).limit(_AT_A_TIME)
            over = [_hold(row) for row in await connection.execute(released)]
        gone = [hold.hold for hold in over if await self._let_go(hold)]
        if gone:
            async with self._database.transaction() as connection:
                await connection.execute(delete(held_elsewhere).where(held_elsewhere.c.hold.in_(gone)))
        for hold in gone:
            self._renewed.pop(hold, None)
        await self._renew()

    async def _renew(self) -> None:
        async with self._database.reading() as connection:
            needed = select(held_elsewhere).where(held_elsewhere.c.released.is_(False))
            holds = [_hold(row) for row in await connection.execute(needed)]
        now = self._clock()
        for hold in holds:
            if now - self._renewed.get(hold.hold, now - RENEW_SECONDS) < RENEW_SECONDS:
                continue
            try:
                await self._keeper(hold).keep(hold, KEPT_SECONDS)
            except NotFound as error:
                # It was deleted while no hold was there: this is said once, and by what needs it when it reads it.
                _logger.error(
                    "what is needed is gone", extra={"holder": hold.holder, "detail": error.message}
                )
            except LuthierError as error:
                _logger.warning(
                    "a hold is not renewed yet", extra={"hold": hold.name, "detail": error.message}
                )
                continue
            self._renewed[hold.hold] = now

    async def _let_go(self, hold: Hold) -> bool:
        try:
            await self._keeper(hold).release(hold)
        except LuthierError as error:
            _logger.warning("a hold is not released yet", extra={"hold": hold.name, "detail": error.message})
            return False
        return True

    def _keeper(self, hold: Hold) -> Keeper:
        return self._keepers[hold.name.split("/")[-2]]


async def record(connection: AsyncConnection, holds: Sequence[Hold], holder: Stored[Any, Any]) -> None:
    """Write down what a new resource holds elsewhere, in the transaction that stores it."""
    rows = [
        {
            "hold": hold.hold,
            "name": hold.name,
            "uid": hold.uid,
            "holder_uid": holder.uid,
            "holder": hold.holder,
            "released": False,
        }
        for hold in holds
    ]
    if rows:
        await connection.execute(insert(held_elsewhere), rows)


async def release_all(connection: AsyncConnection, holder_uid: str) -> None:
    """Write down that a resource needs nothing elsewhere any more."""
    columns = held_elsewhere.c
    await connection.execute(
        update(held_elsewhere).where(columns.holder_uid == holder_uid).values(released=True)
    )


def _hold(row: Any) -> Hold:
    return Hold(hold=row.hold, name=row.name, uid=row.uid, holder=row.holder)
