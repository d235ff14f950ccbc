"""The standard methods of a family of resources on the wire (AIP-131 to AIP-136), written once for all families.

A servicer makes its methods of them, by name and typed, each of the function that does the work:

    self.GetRendering = standard.get(family.message)
    self.CancelRendering = standard.cancel(family.cancel)
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import grpc.aio
from google.protobuf.message import Message

from luthier.errors import FieldViolation, InvalidArgument
from luthier.runtime.names import Pattern
from luthier.runtime.paging import PageTokens
from luthier.v1.event_pb2 import Event
from luthier.v1.webhook_pb2 import WebhookDelivery
from luthier.work.listing import EntriesRequest, ListRequest, PagedRequest, entries_page, page_that_fits

Context = grpc.aio.ServicerContext[Any, Any]
M = TypeVar("M")
Q = TypeVar("Q")
A = TypeVar("A", bound=Message)
A_co = TypeVar("A_co", covariant=True)
Unary = Callable[[Q, Context], Coroutine[Any, Any, A]]
Page = tuple[tuple[M, ...], str]


class NameRequest(Protocol):
    """Names one resource."""

    @property
    def name(self) -> str:
        """Its name."""


class ChangeRequest(NameRequest, Protocol):
    """Names one resource that is to change."""

    @property
    def etag(self) -> str:
        """As it was last seen; empty: however it is."""


class DeletedRequest(ChangeRequest, Protocol):
    """Names a resource that was deleted."""

    @property
    def uid(self) -> str:
        """Which of several that had the name; empty: the one that was deleted last."""


class Undeletable(Protocol[A_co]):
    """A family whose deleted resources can be brought back: `work.undeleting.Undeleting`."""

    async def undelete(self, name: str, uid: str, etag: str) -> A_co:
        """Bring a deleted resource back."""
        ...

    async def purge(self, name: str, uid: str, etag: str) -> A_co:
        """Give a deleted resource up."""
        ...


class WatchRequest(NameRequest, Protocol):
    """Names one resource to follow."""

    @property
    def start_sequence(self) -> int:
        """Number of the first event wanted."""

    @property
    def uid(self) -> str:
        """Whose numbers those are; empty: of whatever has the name."""


class EventsRequest(EntriesRequest, Protocol):
    """Pages through the events of one resource."""

    @property
    def parent(self) -> str:
        """Its name."""


class Told(Protocol):
    """A family whose resources have events."""

    async def uid_of(self, name: str) -> str:
        """Return the uid of the resource of a name. Raises NotFound."""
        ...

    async def events(self, uid: str, after: int, limit: int) -> Sequence[Event]:
        """Return at most `limit` events of the resource of a uid after a number."""
        ...


class Telling(Protocol):
    """A family whose resources tell webhooks of their end."""

    async def uid_of(self, name: str) -> str:
        """Return the uid of the resource of a name. Raises NotFound."""
        ...

    async def deliveries(self, uid: str, after: int, limit: int) -> Sequence[tuple[int, WebhookDelivery]]:
        """Return at most `limit` deliveries of the resource of a uid after a number, each with its own number."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class StandardMethods:
    """Makes the methods of one family: what is a name of it is looked at here, the rest is done by what is given.

    Every method raises InvalidArgument for a name, or a parent, that is none of the family.

    Attributes:
        pattern: of the family's names.
        tokens: makes page tokens.
    """

    pattern: Pattern
    tokens: PageTokens

    def get(self, read: Callable[[str], Awaitable[A]]) -> Unary[NameRequest, A]:
        """Return a method that reads one resource."""

        async def get(request: NameRequest, _: Context) -> A:
            self.check(request.name)
            return await read(request.name)

        return get

    def list(
        self,
        page: Callable[[ListRequest, PageTokens], Awaitable[Page[M]]],
        answer: Callable[[Sequence[M], str], A],
    ) -> Unary[PagedRequest, A]:
        """Return a method that pages through the resources below a parent; a page of great ones holds fewer."""
        parent = self.pattern.parent

        async def read(request: PagedRequest) -> tuple[A, int]:
            values, token = await page(request, self.tokens)
            return answer(values, token), len(values)

        async def list_(request: PagedRequest, _: Context) -> A:
            parent.parse(request.parent, field="parent")
            return await page_that_fits(request, read)

        return list_

    def cancel(self, cancel: Callable[[str, str], Awaitable[A]]) -> Unary[ChangeRequest, A]:
        """Return a method that asks a resource to stop."""
        return self.change(cancel)

    def delete(self, delete: Callable[[str, str], Awaitable[A]]) -> Unary[ChangeRequest, A]:
        """Return a method that deletes a resource."""
        return self.change(delete)

    def undelete(self, family: Undeletable[A]) -> Unary[DeletedRequest, A]:
        """Return a method that brings a deleted resource back."""
        return self._deleted(family.undelete)

    def purge(self, family: Undeletable[A]) -> Unary[DeletedRequest, A]:
        """Return a method that gives a deleted resource up for good."""
        return self._deleted(family.purge)

    def _deleted(self, change: Callable[[str, str, str], Awaitable[A]]) -> Unary[DeletedRequest, A]:
        async def changed(request: DeletedRequest, _: Context) -> A:
            self.check(request.name)
            return await change(request.name, request.uid, request.etag)

        return changed

    def change(self, change: Callable[[str, str], Awaitable[A]]) -> Unary[ChangeRequest, A]:
        """Return a method that changes a resource, given its name and the etag that it is to have."""

        async def changed(request: ChangeRequest, _: Context) -> A:
            self.check(request.name)
            return await change(request.name, request.etag)

        return changed

    def watch(
        self, follow: Callable[[str, int, str], AsyncIterator[bytes]]
    ) -> Callable[[WatchRequest, Context], AsyncGenerator[bytes, None]]:
        """Return a method that streams the events of a resource from a number on.

        As bytes, which are sent as such: nobody makes them of a message again, however many watch.
        """

        async def watch(request: WatchRequest, _: Context) -> AsyncGenerator[bytes, None]:
            self.check(request.name)
            if request.start_sequence < 0:
                raise InvalidArgument.of_fields(
                    FieldViolation(
                        field="start_sequence", description=f"must be 0 or more, got {request.start_sequence}"
                    )
                )
            async for event in follow(request.name, request.start_sequence, request.uid):
                yield event

        return watch

    def events(self, family: Told, answer: Callable[[Sequence[Event], str], A]) -> Unary[EventsRequest, A]:
        """Return a method that pages through the events that a resource has so far."""

        async def events(request: EventsRequest, _: Context) -> A:
            self.check(request.parent, field="parent")
            uid = await family.uid_of(request.parent)
            found = await entries_page(self.tokens, request, uid, family.events, lambda event: event.sequence)
            return answer(*found)

        return events

    def deliveries(
        self, family: Telling, answer: Callable[[Sequence[WebhookDelivery], str], A]
    ) -> Unary[EventsRequest, A]:
        """Return a method that pages through what became of telling a resource's webhooks."""

        async def deliveries(request: EventsRequest, _: Context) -> A:
            self.check(request.parent, field="parent")
            uid = await family.uid_of(request.parent)
            found, token = await entries_page(
                self.tokens, request, uid, family.deliveries, lambda one: one[0]
            )
            return answer([delivery for _, delivery in found], token)

        return deliveries

    def check(self, name: str, *, field: str = "name") -> None:
        """Raise InvalidArgument for a name that is none of the family."""
        self.pattern.parse(name, field=field)
