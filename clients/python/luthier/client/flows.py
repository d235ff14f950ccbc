"""What the client does, written once and without I/O.

A flow is a generator: it yields operations (make this call, wait so long, hash this file), is sent their
results and returns its own. `sync_driver` performs the operations over `grpc`, `async_driver` over
`grpc.aio`; retries, resumption, uploads and watches are flows and so are the same in both. An operation that
fails raises its `LuthierError` at the `yield`. A flow that streams yields `Emit` for each item. Its `finally`
blocks run when the stream is closed, and must not yield.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from time import monotonic
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeAlias, TypeVar, cast

from luthier.client.retry import Backoff, RetryPolicy, is_retryable
from luthier.errors import LuthierError, Reason

if TYPE_CHECKING:
    import grpc
    from google.protobuf.message import Message

    from luthier.client.channels import Stubs

Q = TypeVar("Q", bound="Message")
M = TypeVar("M", bound="Message")
R = TypeVar("R")
T = TypeVar("T")

UnaryPick: TypeAlias = "Callable[[Stubs], grpc.UnaryUnaryMultiCallable[Q, M]]"
StreamPick: TypeAlias = "Callable[[Stubs], grpc.UnaryStreamMultiCallable[Q, M]]"


class OpenStream(Protocol):
    """A running server stream, of either stack."""

    def cancel(self) -> bool:
        """End the call; the server is told."""
        ...


@dataclass(frozen=True, slots=True)
class Invoke:
    """Make one attempt of a unary call. Result: the response."""

    pick: Callable[[Stubs], Any]
    request: Message
    timeout_seconds: float


@dataclass(frozen=True, slots=True)
class Send:
    """Make one attempt of a client-streaming call.

    Result: the response. `messages` may block: it is read off the event loop.
    """

    pick: Callable[[Stubs], Any]
    messages: Iterator[Message]
    timeout_seconds: float


@dataclass(frozen=True, slots=True)
class Open:
    """Begin a server-streaming call. Result: an `OpenStream`. A timeout of None means no deadline."""

    pick: Callable[[Stubs], Any]
    request: Message
    timeout_seconds: float | None


@dataclass(frozen=True, slots=True)
class Receive:
    """Wait for the next message of a stream. Result: the message, or None after the last one."""

    stream: OpenStream


@dataclass(frozen=True, slots=True)
class Sleep:
    """Wait. Result: None."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Work:
    """Run a function that blocks, off the event loop. Result: what it returns."""

    function: Callable[[], Any]


@dataclass(frozen=True, slots=True)
class Emit(Generic[T]):
    """Hand an item to whoever reads the stream. Result: None."""

    item: T


Operation: TypeAlias = Invoke | Send | Open | Receive | Sleep | Work
Flow: TypeAlias = Generator[Operation, Any, R]
StreamFlow: TypeAlias = Generator[Operation | Emit[T], Any, None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scope:
    """What every flow is told.

    The project that short names belong to, and how patient to be. `clock`: monotonic seconds.
    """

    project: str = "default"
    timeout_seconds: float = 30.0
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    clock: Callable[[], float] = monotonic

    def backoff(self) -> Backoff:
        """Return a fresh count of failures."""
        return Backoff(self.retry, self.clock)


def work(function: Callable[[], R]) -> Flow[R]:
    """Run a blocking function and return its result."""
    return cast(R, (yield Work(function)))


def call(scope: Scope, pick: UnaryPick[Q, M], request: Q) -> Flow[M]:
    """Make a unary call, again while `is_retryable`.

    A request that takes a request_id gets one, the same for all attempts.
    """
    _fill_request_id(request)
    backoff = scope.backoff()
    while True:
        try:
            return cast(M, (yield Invoke(pick, request, scope.timeout_seconds)))
        except LuthierError as error:
            if not is_retryable(error):
                raise
            delay = backoff.delay_after(error)
        yield Sleep(delay)


class _Page(Protocol):
    next_page_token: str


def pages(
    scope: Scope, pick: UnaryPick[Q, M], request: Q, items: Callable[[M], Iterable[T]]
) -> StreamFlow[T]:
    """Emit the items of all pages. A page is asked for when the one before is used up."""
    while True:
        response = yield from call(scope, pick, request)
        for item in items(response):
            yield Emit(item)
        token = cast(_Page, response).next_page_token
        if not token:
            return
        request = replaced(request, page_token=token)


def collect(flow: StreamFlow[T]) -> Flow[list[T]]:
    """Return all items that a streaming flow emits."""
    items: list[T] = []
    result: Any = None
    error: LuthierError | None = None
    while True:
        try:
            step = flow.send(result) if error is None else flow.throw(error)
        except StopIteration:
            return items
        result, error = None, None
        if isinstance(step, Emit):
            items.append(step.item)
            continue
        try:
            result = yield step
        except LuthierError as raised:
            error = raised


def replaced(message: Q, **fields: object) -> Q:
    """Return a copy of a message with other values in scalar fields."""
    copy = type(message)()
    copy.CopyFrom(message)
    for name, value in fields.items():
        setattr(copy, name, value)
    return copy


class ResumedStream(Generic[Q, M]):
    """A server stream that is opened again where it broke off.

    `request_at` builds the request for what is still wanted. Time without any message counts against the
    retry deadline.
    """

    def __init__(
        self,
        scope: Scope,
        pick: StreamPick[Q, M],
        request_at: Callable[[], Q],
        *,
        timeout_seconds: Callable[[], float | None] = lambda: None,
    ) -> None:
        self._pick = pick
        self._request_at = request_at
        self._timeout_seconds = timeout_seconds
        self._backoff = scope.backoff()
        self._stream: OpenStream | None = None

    def receive(self) -> Flow[M | None]:
        """Return the next message, or None when the server has sent all."""
        while True:
            try:
                if self._stream is None:
                    request = self._request_at()
                    self._stream = cast(
                        OpenStream, (yield Open(self._pick, request, self._timeout_seconds()))
                    )
                message = cast("M | None", (yield Receive(self._stream)))
            except LuthierError as error:
                self.close()
                if not is_retryable(error) and error.reason != Reason.SLOW_READER:
                    raise
                delay = self._backoff.delay_after(error)
            else:
                self._backoff.progressed()
                if message is None:
                    self.close()
                return message
            yield Sleep(delay)

    def close(self) -> None:
        """End the call that is running, if any. The next `receive` opens another."""
        if self._stream is not None:
            self._stream.cancel()
            self._stream = None


def _fill_request_id(request: Message) -> None:
    if "request_id" in request.DESCRIPTOR.fields_by_name and not getattr(request, "request_id"):  # noqa: B009
        setattr(request, "request_id", str(uuid.uuid4()))  # noqa: B010
