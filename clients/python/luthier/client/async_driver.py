"""Performs flows over `grpc.aio` on the running event loop; makes them coroutines and async iterators."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import TYPE_CHECKING, Any, Concatenate, Generic, ParamSpec, TypeVar, cast, overload

import grpc
import grpc.aio

from luthier.client.channels import Connection, connect_async
from luthier.client.flows import (
    Emit,
    Flow,
    Invoke,
    Operation,
    Receive,
    Scope,
    Send,
    Sleep,
    StreamFlow,
    Work,
)
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
    """Owns the channels of one async client. Belongs to the event loop of its first call."""

    def __init__(self, config: ClientConfig, scope: Scope) -> None:
        self.scope = scope
        self._config = config
        self._connection: Connection | None = None

    async def run(self, flow: Flow[R]) -> R:
        """Perform a flow to its end and return its result. Cancelling the task ends the running call."""
        result: Any = None
        error: BaseException | None = None
        try:
            while True:
                operation = flow.send(result) if error is None else flow.throw(error)
                result, error = await self.perform(operation)
        except StopIteration as end:
            return cast(R, end.value)
        finally:
            flow.close()

    async def perform(self, operation: Operation) -> tuple[Any, Exception | None]:
        """Return the result of an operation, or the error that the flow shall see."""
        try:
            return await self._perform(operation), None
        except grpc.RpcError as error:
            return None, from_rpc_error(error)
        except Exception as error:
            return None, error

    async def close(self) -> None:
        """Close the channels; running calls end as cancelled."""
        connection, self._connection = self._connection, None
        for channel in connection.channels if connection else ():
            await cast(grpc.aio.Channel, channel).close()

    async def _perform(self, operation: Operation) -> Any:
        if isinstance(operation, Sleep):
            return await asyncio.sleep(operation.seconds)
        if isinstance(operation, Work):
            return await asyncio.to_thread(operation.function)
        if isinstance(operation, Receive):
            message = await cast("grpc.aio.UnaryStreamCall[Any, Any]", operation.stream).read()
            return None if message is grpc.aio.EOF else message
        if self._connection is None:
            self._connection = connect_async(self._config)
        connection = self._connection
        method = operation.pick(connection.stubs)
        if isinstance(operation, Send):
            return await _send(method, operation, connection)
        call = method(operation.request, timeout=operation.timeout_seconds, metadata=connection.metadata)
        return await call if isinstance(operation, Invoke) else call


async def _send(method: Callable[..., Any], operation: Send, connection: Connection) -> Any:
    call = method(timeout=operation.timeout_seconds, metadata=connection.metadata)
    try:
        while (message := await asyncio.to_thread(next, operation.messages, None)) is not None:
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

    def __init__(self, driver: AsyncDriver, flow: StreamFlow[T]) -> None:
        self._driver = driver
        self._flow = flow

    def __aiter__(self) -> AsyncStream[T]:
        return self

    async def __anext__(self) -> T:
        result: Any = None
        error: Exception | None = None
        while (operation := self._send(result, error)) is not None:
            if isinstance(operation, Emit):
                return operation.item
            try:
                result, error = await self._driver.perform(operation)
            except BaseException:
                self._flow.close()
                raise
        raise StopAsyncIteration

    def _send(self, result: Any, error: Exception | None) -> Operation | Emit[T] | None:
        try:
            return self._flow.send(result) if error is None else self._flow.throw(error)
        except StopIteration:
            # A coroutine may not raise StopIteration.
            return None

    async def __aenter__(self) -> AsyncStream[T]:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End the call, if it is running. No more items come."""
        self._flow.close()


class AsyncResource:
    """A group of methods on one driver."""

    def __init__(self, driver: AsyncDriver) -> None:
        self._driver = driver

    def _run(
        self, build: Callable[Concatenate[Scope, P], Flow[R]], *args: P.args, **kwargs: P.kwargs
    ) -> Coroutine[Any, Any, R]:
        return self._driver.run(build(self._driver.scope, *args, **kwargs))

    def _stream(
        self, build: Callable[Concatenate[Scope, P], StreamFlow[T]], *args: P.args, **kwargs: P.kwargs
    ) -> AsyncStream[T]:
        return AsyncStream(self._driver, build(self._driver.scope, *args, **kwargs))


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
            return resource._run(build, *args, **kwargs)

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
            return resource._stream(build, *args, **kwargs)

        return bound(run, build, instance)
