"""What resources of this service need at other services, held there for as long as it is needed.

A hold is taken before the resource that needs it is stored, for a short time; from then on a row says that it is
needed, and `sweep` prolongs it. When the need is over the row says so, in the transaction that ends it, and `sweep`
releases the hold, as it does with those of resources that were not stored after all. A service that dies in between,
or a peer that is away, only makes that later. No peer is called while a transaction writes: the peer may wait for this
service.
"""

from __future__ import annotations

import logging
import math
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import grpc
import grpc.aio
from sqlalchemy import Executable, delete, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from luthier.errors import LuthierError, NotFound
from luthier.runtime.auth import HOLDER, TaskTokens
from luthier.runtime.names import project_of
from luthier.storage.database import Database
from luthier.storage.stored import Stored
from luthier.v1.reference_pb2 import Reference
from luthier.work.peers import bearer, service_error_of
from luthier.work.schema import held_elsewhere
from luthier.worker.v1 import hold_service_pb2, hold_service_pb2_grpc

TAKEN_SECONDS = 600.0
KEPT_SECONDS = 24 * 3600.0
RENEW_SECONDS = 1800.0
_CALL_SECONDS = 10.0
_TOKEN_SECONDS = 60.0
_COMMIT_SECONDS = 60.0
_AWAY_SECONDS = 5.0
_AWAY = frozenset({"UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED"})
"""Codes of a peer that may do the same a moment later; any other is an answer, about the one hold."""
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

    async def keep(self, hold: Hold, seconds: float) -> str:
        """Hold for so long from now; return the uid of what is held. Raises NotFound, Unavailable."""
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

    async def keep(self, hold: Hold, seconds: float) -> str:
        """Hold for so long from now; return the uid of what is held. Raises NotFound, Unavailable."""
        request = hold_service_pb2.CreateHoldRequest(
            name=hold.name, uid=hold.uid, hold=hold.hold, holder=hold.holder, seconds=seconds
        )
        uid: str = (await self._call(self._stub.CreateHold, request)).uid
        return uid

    async def release(self, hold: Hold) -> None:
        """Let go. Raises Unavailable when the service is away."""
        request = hold_service_pb2.ReleaseHoldRequest(name=hold.name, hold=hold.hold)
        await self._call(self._stub.ReleaseHold, request)

    async def _call(self, method: Any, request: Any) -> Any:
        token = self._tokens.mint(project_of(request.name), (request.name,), 0, HOLDER, _TOKEN_SECONDS)
        try:
            return await method(request, metadata=bearer(token), timeout=_CALL_SECONDS)
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
        self._away_until: dict[Keeper, float] = {}
        # Taken, and not known to be stored; from when on they are let go if they are not.
        self._taken: dict[Hold, float] = {}
        # What a peer answered that will not keep, or let go, a hold: said when it is new.
        self._refused: dict[str, str] = {}

    @asynccontextmanager
    async def holding(self, holder: str, needed: Iterable[Reference]) -> AsyncIterator[Sequence[Hold]]:
        """Hold what a resource of the name `holder` needs, for a block that stores it by `Family.add`.

        When the block fails, they are let go soon. Raises NotFound for what is deleted meanwhile, and Unavailable.
        """
        assert not self._database.is_writing(), (
            "a peer may wait for this service: call it before the transaction"
        )
        holds = [
            Hold(hold=str(uuid.uuid4()), name=one.name, uid=one.uid, holder=holder)
            for one in {reference.name: reference for reference in needed}.values()
        ]
        # Before the calls: one whose answer does not come may have been made all the same.
        self._taken.update(dict.fromkeys(holds, math.inf))
        stored_by = self._clock()
        try:
            for hold in holds:
                await self._keeper(hold).keep(hold, TAKEN_SECONDS)
            yield holds
            # What the block stored is committed a little later, or not.
            stored_by = self._clock() + _COMMIT_SECONDS
        finally:
            self._taken.update(dict.fromkeys(holds, stored_by))

    async def sweep(self) -> None:
        """Prolong what is needed still, and release what is not."""
        async with self._database.reading() as connection:
            rows = (await connection.execute(select(held_elsewhere).order_by(held_elsewhere.c.hold))).all()
        for row in rows:
            self._taken.pop(_hold(row), None)
        for row in rows:
            if not row.released:
                await self._contained(self._renew, _hold(row))
        for row in rows:
            if row.released:
                await self._contained(self._release, _hold(row))
        for hold in [one for one, stored_by in self._taken.items() if stored_by <= self._clock()]:
            await self._contained(self._abandon, hold)

    async def _contained(self, work: Callable[[Hold], Awaitable[None]], hold: Hold) -> None:
        """Do one thing of a sweep: one that fails, is refused, or waits for its peer keeps no other from being done."""
        keeper = self._keepers.get(_collection(hold))
        if keeper is None:
            _logger.error("no service is known that keeps %s for %s", hold.name, hold.holder)
            return
        away_until = self._away_until.get(keeper)
        if away_until is not None and self._clock() < away_until:
            return
        try:
            await work(hold)
        except LuthierError as error:
            if error.code not in _AWAY:
                self._note_refusal(hold, error)
                return
            if away_until is None:
                _logger.warning("holds wait for a peer", extra={"hold": hold.name, "detail": error.message})
            self._away_until[keeper] = self._clock() + _AWAY_SECONDS
        except Exception:
            _logger.exception("a hold on %s could not be looked after", hold.name)
        else:
            self._away_until.pop(keeper, None)
            self._refused.pop(hold.hold, None)

    def _note_refusal(self, hold: Hold, error: LuthierError) -> None:
        told = f"{error.code} {error.reason}: {error.message}"
        if self._refused.get(hold.hold) != told:
            self._refused[hold.hold] = told
            detail = {"hold": hold.hold, "held": hold.name, "holder": hold.holder, "detail": told}
            _logger.error("a peer refuses a hold; it is asked again", extra=detail)

    async def _renew(self, hold: Hold) -> None:
        now = self._clock()
        if now - self._renewed.get(hold.hold, -math.inf) < RENEW_SECONDS:
            return
        try:
            uid = await self._keeper(hold).keep(hold, KEPT_SECONDS)
        except NotFound as error:
            # It was deleted while no hold was there: this is said once, and by what needs it when it reads it.
            _logger.error("what is needed is gone", extra={"holder": hold.holder, "detail": error.message})
        else:
            if not hold.uid:  # a row of before uids were kept: from now on it means this one
                await self._change(
                    update(held_elsewhere).where(held_elsewhere.c.hold == hold.hold).values(uid=uid)
                )
        self._renewed[hold.hold] = now

    async def _release(self, hold: Hold) -> None:
        await self._keeper(hold).release(hold)
        await self._change(delete(held_elsewhere).where(held_elsewhere.c.hold == hold.hold))
        self._renewed.pop(hold.hold, None)

    async def _abandon(self, hold: Hold) -> None:
        await self._keeper(hold).release(hold)
        self._taken.pop(hold, None)

    async def _change(self, statement: Executable) -> None:
        async with self._database.transaction(makes_room=True) as connection:
            await connection.execute(statement)

    def _keeper(self, hold: Hold) -> Keeper:
        return self._keepers[_collection(hold)]


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


def _collection(hold: Hold) -> str:
    return hold.name.split("/")[-2]
