"""What can be done with the resources of any family: read, list, follow, move from state to state, stop."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection
from typing import Any, Generic, Protocol, TypeVar

from google.protobuf.message import Message
from sqlalchemy.ext.asyncio import AsyncConnection

from luthier.errors import FailedPrecondition
from luthier.runtime.paging import PageTokens
from luthier.storage.database import Database
from luthier.storage.resource_messages import StatefulMessage
from luthier.storage.stored import Rows, Stored, require_etag
from luthier.v1 import event_pb2
from luthier.work.convert import status_to_failure
from luthier.work.events import Entry, StateChanged
from luthier.work.lifecycle import Lifecycle
from luthier.work.listing import ListRequest, list_page
from luthier.work.log import EventLog
from luthier.work.tasks import NewTask, Task

M = TypeVar("M", bound=StatefulMessage)
P = TypeVar("P", bound=Message)


class Tasks(Protocol):
    """Where work for workers is queued."""

    async def enqueue(self, connection: AsyncConnection, new: NewTask) -> Task:
        """Queue a task in the caller's transaction."""
        ...

    async def request_cancel(self, connection: AsyncConnection, subject: str) -> None:
        """Stop the task of a resource in the caller's transaction."""
        ...


def require_state(stored: Stored[M, P], state: int, lifecycle: Lifecycle) -> Stored[M, P]:
    """Return the resource. Raises FailedPrecondition WRONG_STATE unless it is in a state, with why it failed."""
    message = stored.message
    if message.state == state:
        return stored
    why = f": {message.error.message}" if message.HasField("error") else ""
    now = lifecycle.name(message.state)
    raise FailedPrecondition(
        f"{message.name} must be {lifecycle.name(state)}, it is {now}{why}",
        metadata={"name": message.name, "state": now},
    )


class Family(Generic[M, P]):
    """The resources of one family with states, and the events that tell of them."""

    def __init__(
        self, rows: Rows[M, P], lifecycle: Lifecycle, database: Database, log: EventLog, tasks: Tasks
    ) -> None:
        self.lifecycle = lifecycle
        self._rows = rows
        self._database = database
        self._log = log
        self._tasks = tasks

    async def read(self, name: str) -> Stored[M, P]:
        """Return a resource by one cheap read. Raises NotFound."""
        return await self._rows.read(self._database, name)

    async def stored(self, connection: AsyncConnection, name: str) -> Stored[M, P]:
        """Return a resource as the transaction sees it. Raises NotFound."""
        return await self._rows.get(connection, name)

    async def page(
        self, request: ListRequest, tokens: PageTokens, *, filters: Collection[str] = ("state", "labels")
    ) -> tuple[tuple[M, ...], str]:
        """Return a page of resources and the next page's token. Raises InvalidArgument."""
        return await list_page(self._database, self._rows, tokens, request, filters=filters)

    async def watch(self, name: str, start_sequence: int) -> AsyncIterator[event_pb2.Event]:
        """Yield the events of a resource from a number on, until its final one. Raises NotFound, OutOfRange."""
        await self.read(name)
        async for event in self._log.watch(name, start_sequence):
            yield event

    async def add(
        self, connection: AsyncConnection, message: M, private: P, new: NewTask | None = None
    ) -> Stored[M, P]:
        """Store a new resource and queue the task that works for it, if any. Raises AlreadyExists."""
        stored = await self._rows.insert(connection, message, private)
        await self._announce(connection, stored)
        if new is not None:
            await self._tasks.enqueue(connection, new)
        return stored

    async def move(
        self,
        connection: AsyncConnection,
        stored: Stored[M, P],
        state: int,
        *,
        changed: M | None = None,
        private: P | None = None,
        why: str = "",
        attempt: int = 0,
    ) -> Stored[M, P]:
        """Bring a resource into a state; `changed` is the message with all that changes besides.

        `why` is told with the event, and so is the attempt. A final state sets the `end_time` of a resource that
        has one. Raises FailedPrecondition when the state may not follow, Aborted when the resource was changed
        meanwhile.
        """
        old = stored.message
        message = stored.copy() if changed is None else changed
        self.lifecycle.require(old.name, old.state, state)
        message.state = state
        if self.lifecycle.is_final(state) and "end_time" in message.DESCRIPTOR.fields_by_name:
            ended: Any = message
            ended.end_time.GetCurrentTime()
        moved = await self._rows.update(connection, stored, message, private)
        await self._announce(connection, moved, why, attempt)
        return moved

    async def cancel(self, name: str, etag: str, stopping: int) -> M:
        """Ask a resource to stop; one that has ended or is stopping stays as it is.

        `stopping` is the state that it is in until its worker has heard of it; a state that it may not follow is
        one without a worker, which ends at once. Raises NotFound, Aborted ETAG_MISMATCH.
        """
        async with self._database.transaction(makes_room=True) as connection:
            stored = await self._rows.get(connection, name)
            require_etag(stored, etag)
            state: int = stored.message.state
            if state == stopping or self.lifecycle.is_final(state):
                return stored.message
            if self.lifecycle.may_become(state, stopping):
                await self.move(connection, stored, stopping)
            await self._tasks.request_cancel(connection, name)
            return (await self._rows.get(connection, name)).message

    async def _announce(
        self, connection: AsyncConnection, stored: Stored[M, P], why: str = "", attempt: int = 0
    ) -> None:
        message = stored.message
        change = StateChanged(
            state=self.lifecycle.name(message.state),
            message=why,
            failure=status_to_failure(message.error) if message.HasField("error") else None,
            final=self.lifecycle.is_final(message.state),
        )
        await self._log.append(connection, message.name, [Entry(payload=change, attempt=attempt)])
