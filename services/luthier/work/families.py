"""What can be done with the resources of any family: read, list, follow, move, stop, delete."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

from google.protobuf.message import Message
from google.rpc import status_pb2
from sqlalchemy.ext.asyncio import AsyncConnection

from luthier.errors import DataLoss, FailedPrecondition, NotFound
from luthier.runtime.names import project_of
from luthier.runtime.paging import PageTokens
from luthier.storage.database import Database
from luthier.storage.resource_messages import ResourceMessage, StatefulMessage
from luthier.storage.stored import Rows, Stored, require_etag, require_uid
from luthier.v1.event_pb2 import Event
from luthier.v1.reference_pb2 import Reference
from luthier.v1.webhook_pb2 import Webhook, WebhookDelivery
from luthier.work import elsewhere
from luthier.work.elsewhere import Hold
from luthier.work.events import state_changed
from luthier.work.holds import Holds
from luthier.work.keeping import Keeping
from luthier.work.lifecycle import Lifecycle
from luthier.work.listing import ListRequest, Live, list_page, told_apart
from luthier.work.log import EventLog, page_expired
from luthier.work.requirements import Requirements
from luthier.work.tasks import NewTask, Task, TaskKind
from luthier.work.undeleting import Undeleting
from luthier.work.webhooks import outbox

M = TypeVar("M", bound=StatefulMessage)
P = TypeVar("P", bound=Message)
WAITING = "waiting"
"""Field that says why nobody works for a resource. Rows keep it as they keep progress: it comes and goes likewise."""


PartUids = Callable[[AsyncConnection, str], Awaitable[Sequence[str]]]
"""What goes with a resource of a uid, by uids."""


async def _none(_connection: AsyncConnection, _uid: str) -> Sequence[str]:
    return ()


class Tasks(Protocol):
    """Where work for workers is queued."""

    async def enqueue(self, connection: AsyncConnection, new: NewTask) -> Task:
        """Queue a task in the caller's transaction."""
        ...

    async def request_cancel(self, connection: AsyncConnection, uid: str) -> bool:
        """Stop the tasks of a resource in the caller's transaction. Returns whether there was any to stop."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What a new resource needs to go on being there.

    Attributes:
        until_end: uids of resources of the same service, until it has ended.
        lasting: uids of resources of the same service, as long as it is there itself.
        elsewhere: resources of other services that `Elsewhere.holding` holds, until it has ended.
    """

    until_end: Sequence[str] = ()
    lasting: Sequence[str] = ()
    elsewhere: Sequence[Hold] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a worker is to do for a resource, and must have for it; its token may read `resources` at others.

    `share`: which share of the whole, from 1; 0: the whole.
    """

    kind: TaskKind
    resources: tuple[str, ...] = ()
    required: Requirements = field(default_factory=Requirements)
    share: int = 0


class DerivedMessage(ResourceMessage, Protocol):
    """The message of a resource that was made from others."""

    @property
    def references(self) -> Sequence[Reference]:
        """What it was made from."""


def referred(message: DerivedMessage, name: str) -> Reference:
    """Return the reference to a resource of a name that a resource was made from. Raises DataLoss when it has none."""
    for reference in message.references:
        if reference.name == name:
            return reference
    raise DataLoss(f"{message.name} does not say which {name} it was made from")


def told_of(message: DerivedMessage, name: str) -> str:
    """Return what tells the resource of a name that a resource was made from from others of it.

    Its uid; its digest where it was made before uids were kept; empty where it was made from none of the name.
    """
    found = [told_apart(one.uid, one.digest) for one in message.references if one.name == name]
    return found[0][0] if found and found[0] else ""


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
        self,
        rows: Rows[M, P],
        lifecycle: Lifecycle,
        database: Database,
        log: EventLog,
        tasks: Tasks,
        keeping: Keeping,
    ) -> None:
        self.lifecycle = lifecycle
        self.undeleting = Undeleting(rows, database, keeping)
        self._rows = rows
        self._database = database
        self._log = log
        self._tasks = tasks
        self._holds = Holds()

    async def read(self, name: str, uid: str = "") -> Stored[M, P]:
        """Return a resource by one cheap read.

        `uid`, if given, is the one that it must have. Raises NotFound, RESOURCE_REPLACED where it has another one.
        """
        stored = await self._rows.read(self._database, name)
        require_uid(stored, uid)
        return stored

    async def message(self, name: str) -> M:
        """Return a resource as callers see it. Raises NotFound."""
        return (await self.read(name)).message

    async def live(self, name: str) -> Sequence[str]:
        """Return the uid of the resource that has a name now, as filters take it; empty when none has."""
        try:
            return [(await self.read(name)).uid]
        except NotFound:
            return ()

    async def uid_of(self, name: str) -> str:
        """Return the uid of the resource of a name. Raises NotFound."""
        return (await self.read(name)).uid

    async def get(self, connection: AsyncConnection, name: str) -> Stored[M, P]:
        """Return a resource as the transaction sees it. Raises NotFound."""
        return await self._rows.get(connection, name)

    async def of_uid(self, connection: AsyncConnection, uid: str) -> Stored[M, P]:
        """Return a resource as the transaction sees it. Raises NotFound, also when it is deleted."""
        return await self._rows.of_uid(connection, uid)

    async def page(
        self,
        request: ListRequest,
        tokens: PageTokens,
        *,
        filters: Collection[str] = ("state", "labels"),
        live: Mapping[str, Live] | None = None,
    ) -> tuple[tuple[M, ...], str]:
        """Return a page of resources and the next page's token. Raises InvalidArgument, and what `live` raises."""
        return await list_page(self._database, self._rows, tokens, request, filters=filters, live=live)

    async def watch(self, name: str, start_sequence: int, uid: str = "") -> AsyncGenerator[bytes, None]:
        """Yield the events of a resource from a number on, until its final one, as the bytes of each.

        Raises as `read`, and OutOfRange.
        """
        stored = await self.read(name, uid)
        require = partial(self._rows.of_uid, uid=stored.uid)
        async for event in self._log.watch(stored.uid, name, start_sequence, require):
            yield event

    async def events(self, uid: str, after: int, limit: int) -> Sequence[Event]:
        """Return at most `limit` events of the resource of a uid after a number; 0: from the first there is.

        Raises OutOfRange where the next one is gone.
        """
        async with self._database.reading() as connection:
            found = await self._log.read(connection, uid, after + 1, limit)
        if after and found and found[0].sequence > after + 1:
            raise page_expired(uid, after, found[0].sequence)
        return found

    async def deliveries(self, uid: str, after: int, limit: int) -> Sequence[tuple[int, WebhookDelivery]]:
        """Return at most `limit` deliveries of the resource of a uid after a number, each with its own number."""
        async with self._database.reading() as connection:
            return await outbox.of_resource(connection, uid, after, limit)

    async def add(
        self,
        connection: AsyncConnection,
        message: M,
        private: P,
        work: Work | None = None,
        needs: Needs | None = None,
    ) -> Stored[M, P]:
        """Store a new resource, hold what it needs and queue the work for it, if any. Raises AlreadyExists."""
        stored = await self._rows.insert(connection, message, private)
        await self._announce(connection, stored)
        if needs is not None:
            await self._holds.add(connection, needs.until_end, stored)
            await self._holds.add(connection, needs.lasting, stored, lasting=True)
            await elsewhere.record(connection, needs.elsewhere, stored)
        if work is not None:
            await self.assign(connection, stored, work)
        return stored

    async def assign(self, connection: AsyncConnection, stored: Stored[M, P], work: Work) -> None:
        """Queue work for a resource that is there."""
        name = stored.message.name
        new = NewTask(
            kind=work.kind,
            uid=stored.uid,
            subject=name,
            project=project_of(name),
            resources=work.resources,
            required=work.required,
            share=work.share,
        )
        await self._tasks.enqueue(connection, new)

    async def stop(self, connection: AsyncConnection, uid: str) -> None:
        """Stop what is queued or done for a resource, in the caller's transaction."""
        await self._tasks.request_cancel(connection, uid)

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
        message.ClearField(WAITING)
        if self.lifecycle.is_final(state) and "end_time" in message.DESCRIPTOR.fields_by_name:
            ended: Any = message
            ended.end_time.GetCurrentTime()
        moved = await self._rows.update(connection, stored, message, private)
        await self._announce(connection, moved, why, attempt)
        if self.lifecycle.is_final(state):
            await self._holds.end(connection, moved.uid)
            await elsewhere.release_all(connection, moved.uid)
            await self._tell_webhooks(connection, moved)
        return moved

    async def show_waiting(
        self, connection: AsyncConnection, uid: str, why: status_pb2.Status | None
    ) -> None:
        """Let a resource say why nobody can work for it, None: no longer. Its revision and its etag stay."""
        stored = await self._rows.of_uid(connection, uid)
        message = stored.copy()
        message.ClearField(WAITING)
        if why is not None:
            message.waiting.CopyFrom(why)
        await self._rows.report(connection, stored, message)

    async def cancel(self, name: str, etag: str) -> M:
        """Ask a resource to stop; one that has ended or is stopping stays as it is.

        It is stopping until its worker has heard of it; a state that this may not follow is one without a worker, which
        ends at once, and so does one whose work was given up. Raises NotFound, Aborted ETAG_MISMATCH.
        """
        lifecycle = self.lifecycle
        async with self._database.transaction(makes_room=True) as connection:
            stored = await self._rows.get(connection, name)
            require_etag(stored, etag)
            state: int = stored.message.state
            if lifecycle.is_final(state):
                return stored.message
            if lifecycle.may_become(state, lifecycle.stopping):
                await self.move(connection, stored, lifecycle.stopping)
            is_heard = await self._tasks.request_cancel(connection, stored.uid)
            stored = await self._rows.get(connection, name)
            if not is_heard:
                stored = await self.move(connection, stored, lifecycle.cancelled, why="its work was given up")
            return stored.message

    async def delete(self, name: str, etag: str, parts: PartUids = _none) -> M:
        """Delete a resource that has ended and that nothing needs, nor what goes with it.

        Raises NotFound, Aborted ETAG_MISMATCH, FailedPrecondition WRONG_STATE and RESOURCE_IN_USE.
        """
        async with self._database.transaction(makes_room=True) as connection:
            stored = await self._rows.get(connection, name)
            require_etag(stored, etag)
            state = stored.message.state
            if not self.lifecycle.is_final(state):
                now = self.lifecycle.name(state)
                raise FailedPrecondition(
                    f"{name} must have ended before it is deleted, it is {now}; cancel it, or wait for it",
                    metadata={"name": name, "state": now},
                )
            uids = await parts(connection, stored.uid)
            return (await self.undeleting.delete(connection, stored, uids)).message

    async def _announce(
        self, connection: AsyncConnection, stored: Stored[M, P], why: str = "", attempt: int = 0
    ) -> None:
        message = stored.message
        change = state_changed(
            self.lifecycle.name(message.state),
            why,
            message.error if message.HasField("error") else None,
            attempt=attempt,
        )
        final = self.lifecycle.is_final(message.state)
        await self._log.append(connection, stored.uid, [change], final=final)

    async def _tell_webhooks(self, connection: AsyncConnection, ended: Stored[M, P]) -> None:
        """Have the webhooks of a resource that has ended told, where its family has some."""
        webhooks: Sequence[Webhook] = getattr(ended.message, "webhooks", ())
        await outbox.record(
            connection, ended.uid, ended.message, webhooks, self.lifecycle.name(ended.message.state)
        )
