"""Does what flows ask for over `grpc.aio` on the running event loop; makes them coroutines and async iterators."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Concatenate, Generic, ParamSpec, TypeVar, cast, overload

import grpc
import grpc.aio

from luthier.client.channels import Connection, connect_async
from luthier.client.flows import (
    Flow,
    M,
    OpenStream,
    Q,
    Running,
    Scope,
    SendPick,
    StreamFlow,
    StreamPick,
    UnaryPick,
)
from luthier.client.spans import CallSpan, calling, opening
from luthier.client.sync_driver import bound
from luthier.client.wire_errors import from_rpc_error
from luthier.errors import Unavailable

if TYPE_CHECKING:
    from luthier.client.config import ClientConfig

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

_FAILED_WRITE = "Internal error from Core"
_SETTLING_CHECKS = 20
_SETTLING_SECONDS = 0.02


class AsyncDriver:
    """A `Driver` that owns the channels of one async client. Belongs to the event loop of its first call.

    Cancelling the task of a flow ends the running call.
    """

    def __init__(self, config: ClientConfig) -> None:
        self._config = config
        self._connection: Connection | None = None

    def scope(self) -> Scope:
        """Return the scope of a new flow."""
        return Scope.of(self, self._config)

    async def invoke(self, pick: UnaryPick[Q, M], request: Q, timeout_seconds: float) -> M:
        """Make a unary call."""
        connection = self._connected()
        method: Any = pick(connection.stubs)
        with calling(pick) as carried:
            try:
                response = await method(
                    request, timeout=timeout_seconds, metadata=connection.metadata + carried
                )
            except grpc.RpcError as error:
                raise from_rpc_error(error) from error
        return cast(M, response)

    async def send(self, pick: SendPick[Q, M], messages: Iterator[Q], timeout_seconds: float) -> M:
        """Make a client-streaming call. `messages` is read in threads."""
        connection = self._connected()
        method: Any = pick(connection.stubs)
        with calling(pick) as carried:
            call = method(timeout=timeout_seconds, metadata=connection.metadata + carried)
            try:
                return cast(M, await _send(call, messages))
            except grpc.RpcError as error:
                raise from_rpc_error(error) from error

    async def open(self, pick: StreamPick[Q, M], request: Q, timeout_seconds: float | None) -> OpenStream[M]:
        """Begin a server-streaming call."""
        connection = self._connected()
        method: Any = pick(connection.stubs)
        with opening(pick) as span:
            metadata = connection.metadata + span.metadata
            return _Messages(method(request, timeout=timeout_seconds, metadata=metadata), span)

    async def sleep(self, seconds: float) -> None:
        """Wait."""
        await asyncio.sleep(seconds)

    async def work(self, function: Callable[[], R]) -> R:
        """Run a function in a thread."""
        return await asyncio.to_thread(function)

    async def close(self) -> None:
        """Close the channels; running calls end as cancelled."""
        connection, self._connection = self._connection, None
        for channel in connection.channels if connection else ():
            await cast(grpc.aio.Channel, channel).close()

    def _connected(self) -> Connection:
        if self._connection is None:
            self._connection = connect_async(self._config)
        return self._connection


@dataclass(frozen=True, slots=True)
class _Messages(Generic[M]):
    running: grpc.aio.UnaryStreamCall[Any, M]
    span: CallSpan

    async def receive(self) -> M | None:
        try:
            message = await self.running.read()
        except grpc.RpcError as error:
            told = from_rpc_error(error)
            self.span.end(told)
            raise told from error
        if message is grpc.aio.EOF:
            self.span.end()
            return None
        return cast(M, message)

    def cancel(self) -> None:
        self.running.cancel()
        self.span.end()


async def _send(call: Any, messages: Iterator[Any]) -> Any:
    try:
        while (message := await asyncio.to_thread(next, messages, None)) is not None:
            await call.write(message)
        await call.done_writing()
    except (asyncio.InvalidStateError, grpc.aio.AioRpcError):
        # The service has answered before it read all, or the connection broke. The answer is below.
        await _settled(call)
    except BaseException:
        call.cancel()
        raise
    return await call


async def _settled(call: Any) -> None:
    """Wait until a call whose write failed knows why the service ended it.

    grpc.aio 1.85 first calls every failed write INTERNAL and replaces that when the trailers have come.
    """
    for _ in range(_SETTLING_CHECKS):
        if await call.code() != grpc.StatusCode.INTERNAL or await call.details() != _FAILED_WRITE:
            return
        await asyncio.sleep(_SETTLING_SECONDS)
    raise Unavailable("the connection broke while bytes were being sent")


class AsyncStream(Generic[T]):
    """An async iterator over items as they come. Closing it (or leaving its `async with`) ends the call."""

    def __init__(self, flow: StreamFlow[T], running: Running) -> None:
        self._flow = flow
        self._running = running

    def __aiter__(self) -> AsyncStream[T]:
        return self

    async def __anext__(self) -> T:
        return await anext(self._flow)

    async def __aenter__(self) -> AsyncStream[T]:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End the call, if it is running. No more items come; whoever waits for one gets CancelledError."""
        self._running.cancel()
        with suppress(RuntimeError):  # the flow is running in another task
            await self._flow.aclose()


class AsyncResource:
    """A group of methods on one driver."""

    def __init__(self, driver: AsyncDriver) -> None:
        self._driver = driver


class async_method(Generic[P, R]):  # noqa: N801 - used like `property`
    """Makes a coroutine method of a resource from the function that builds its flow.

    The scope is filled in.
    """

    def __init__(self, build: Callable[Concatenate[Scope, P], Flow[R]]) -> None:
        self._build = build

    @overload
    def __get__(
        self, instance: None, owner: type
    ) -> Callable[Concatenate[AsyncResource, P], Coroutine[Any, Any, R]]: ...
    @overload
    def __get__(self, instance: AsyncResource, owner: type) -> Callable[P, Coroutine[Any, Any, R]]: ...
    def __get__(self, instance: AsyncResource | None, owner: type) -> Callable[..., Coroutine[Any, Any, R]]:
        """Return the bound method, or the plain function when asked on the class."""
        build = self._build

        def run(resource: AsyncResource, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, R]:
            return build(resource._driver.scope(), *args, **kwargs)

        return bound(run, build, instance)


class async_stream_method(Generic[P, T]):  # noqa: N801 - used like `property`
    """Makes a method that returns an `AsyncStream` from the function that builds its flow."""

    def __init__(self, build: Callable[Concatenate[Scope, P], StreamFlow[T]]) -> None:
        self._build = build

    @overload
    def __get__(
        self, instance: None, owner: type
    ) -> Callable[Concatenate[AsyncResource, P], AsyncStream[T]]: ...
    @overload
    def __get__(self, instance: AsyncResource, owner: type) -> Callable[P, AsyncStream[T]]: ...
    def __get__(self, instance: AsyncResource | None, owner: type) -> Callable[..., AsyncStream[T]]:
        """Return the bound method, or the plain function when asked on the class."""
        build = self._build

        def run(resource: AsyncResource, *args: P.args, **kwargs: P.kwargs) -> AsyncStream[T]:
            scope = resource._driver.scope()
            return AsyncStream(build(scope, *args, **kwargs), scope.running)

        return bound(run, build, instance)
