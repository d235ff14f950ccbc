"""What the client does, written once for both of its stacks.

A flow is a coroutine, a flow that streams an asynchronous generator. What waits goes through the `Driver` of its scope:
over `grpc.aio` that suspends the flow, over `grpc` it blocks, so that such a flow never suspends and is run in one
step. Retries, resumption, uploads and watches are flows and so are the same in both. What a driver cannot do it
raises as a `LuthierError`. The `finally` blocks of a flow that streams run when the stream is closed: they must not
wait.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Iterator
from dataclasses import dataclass, field
from time import monotonic
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeAlias, TypeVar, cast

from luthier.client.retry import Backoff, RetryPolicy, is_retryable
from luthier.errors import DeadlineExceeded, LuthierError, Reason

if TYPE_CHECKING:
    import grpc
    from google.protobuf.message import Message

    from luthier.client.channels import Stubs
    from luthier.client.config import ClientConfig

Q = TypeVar("Q", bound="Message")
M = TypeVar("M", bound="Message")
M_co = TypeVar("M_co", bound="Message", covariant=True)
R = TypeVar("R")
T = TypeVar("T")

UnaryPick: TypeAlias = "Callable[[Stubs], grpc.UnaryUnaryMultiCallable[Q, M]]"
StreamPick: TypeAlias = "Callable[[Stubs], grpc.UnaryStreamMultiCallable[Q, M]]"
SendPick: TypeAlias = "Callable[[Stubs], grpc.StreamUnaryMultiCallable[Q, M]]"
Flow: TypeAlias = Coroutine[Any, Any, R]
StreamFlow: TypeAlias = AsyncGenerator[T, None]


class OpenStream(Protocol[M_co]):
    """A running server stream, of either stack."""

    async def receive(self) -> M_co | None:
        """Wait for the next message; None after the last one."""
        ...

    def cancel(self) -> None:
        """End the call; the server is told."""
        ...


class Driver(Protocol):
    """What a flow does, one attempt each. Raises LuthierError for what a service refuses or cannot be told."""

    async def invoke(self, pick: UnaryPick[Q, M], request: Q, timeout_seconds: float) -> M:
        """Make a unary call."""
        ...

    async def send(self, pick: SendPick[Q, M], messages: Iterator[Q], timeout_seconds: float) -> M:
        """Make a client-streaming call. `messages` may block: it is read off the event loop."""
        ...

    async def open(self, pick: StreamPick[Q, M], request: Q, timeout_seconds: float | None) -> OpenStream[M]:
        """Begin a server-streaming call. A timeout of None means no deadline."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Wait."""
        ...

    async def work(self, function: Callable[[], R]) -> R:
        """Run a function that blocks, off the event loop."""
        ...


@dataclass(slots=True)
class Running:
    """The stream that a flow has open, so that another thread or task can end it."""

    stream: OpenStream[Any] | None = None

    def cancel(self) -> None:
        """End the call, if there is one."""
        if self.stream is not None:
            self.stream.cancel()


@dataclass(frozen=True, slots=True, kw_only=True)
class Scope:
    """What a flow is told.

    What makes its calls, the project that short names belong to, and how patient to be. `clock`: monotonic seconds.
    """

    driver: Driver
    project: str = "default"
    timeout_seconds: float = 30.0
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    clock: Callable[[], float] = monotonic
    running: Running = field(default_factory=Running)

    @classmethod
    def of(cls, driver: Driver, config: ClientConfig) -> Scope:
        """Return the scope of a new flow."""
        return cls(
            driver=driver,
            project=config.project,
            timeout_seconds=config.timeout_seconds,
            retry=config.retry,
        )

    def backoff(self) -> Backoff:
        """Return a fresh count of failures."""
        return Backoff(self.retry, self.clock)

    async def open(
        self, pick: StreamPick[Q, M], request: Q, timeout_seconds: float | None = None
    ) -> OpenStream[M]:
        """Begin a server-streaming call, which ends with the stream of this flow."""
        stream = await self.driver.open(pick, request, timeout_seconds)
        self.running.stream = stream
        return stream


async def call(scope: Scope, pick: UnaryPick[Q, M], request: Q) -> M:
    """Make a unary call, again while `is_retryable`.

    A request that takes a request_id gets one, the same for all attempts.
    """
    _fill_request_id(request)
    backoff = scope.backoff()
    while True:
        try:
            return await scope.driver.invoke(pick, request, scope.timeout_seconds)
        except LuthierError as error:
            if not is_retryable(error):
                raise
            delay = backoff.delay_after(error)
        await scope.driver.sleep(delay)


class _Page(Protocol):
    next_page_token: str


async def pages(
    scope: Scope, pick: UnaryPick[Q, M], request: Q, items: Callable[[M], Iterable[T]]
) -> StreamFlow[T]:
    """Yield the items of all pages. A page is asked for when the one before is used up."""
    while True:
        response = await call(scope, pick, request)
        for item in items(response):
            yield item
        token = cast(_Page, response).next_page_token
        if not token:
            return
        request = replaced(request, page_token=token)


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
        self._scope = scope
        self._pick = pick
        self._request_at = request_at
        self._timeout_seconds = timeout_seconds
        self._backoff = scope.backoff()
        self._stream: OpenStream[M] | None = None

    async def receive(self) -> M | None:
        """Return the next message, or None when the server has sent all."""
        while True:
            try:
                if self._stream is None:
                    self._stream = await self._scope.open(
                        self._pick, self._request_at(), self._timeout_seconds()
                    )
                message = await self._stream.receive()
            except LuthierError as error:
                self.close()
                if not self._is_resumable(error):
                    raise
                delay = self._backoff.delay_after(error)
            else:
                self._backoff.progressed()
                if message is None:
                    self.close()
                return message
            await self._scope.driver.sleep(delay)

    def _is_resumable(self, error: LuthierError) -> bool:
        # A call without a deadline meets that of somebody between, e.g. a proxy, who breaks it off.
        is_broken_off = isinstance(error, DeadlineExceeded) and self._timeout_seconds() is None
        return is_broken_off or is_retryable(error) or error.reason == Reason.SLOW_READER

    def close(self) -> None:
        """End the call that is running, if any. The next `receive` opens another."""
        if self._stream is not None:
            self._stream.cancel()
            self._stream = None


def _fill_request_id(request: Any) -> None:
    if "request_id" in request.DESCRIPTOR.fields_by_name and not request.request_id:
        request.request_id = str(uuid.uuid4())
