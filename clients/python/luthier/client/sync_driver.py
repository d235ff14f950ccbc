"""Performs flows over `grpc`, in the calling thread, and turns them into methods and iterators."""

from __future__ import annotations

import inspect
import threading
import time
from collections.abc import Callable, Iterator
from functools import wraps
from types import TracebackType
from typing import TYPE_CHECKING, Any, Concatenate, Generic, ParamSpec, TypeVar, cast, overload

import grpc

from luthier.client.channels import Connection, connect
from luthier.client.flows import (
    Emit,
    Flow,
    Invoke,
    Open,
    Operation,
    Receive,
    Scope,
    Send,
    Sleep,
    StreamFlow,
    Work,
)
from luthier.client.wire_errors import from_rpc_error

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from luthier.client.config import ClientConfig

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


class SyncDriver:
    """Owns the channels of one sync client. May be used by many threads at once."""

    def __init__(self, config: ClientConfig, scope: Scope) -> None:
        self.scope = scope
        self._config = config
        self._lock = threading.Lock()
        self._connection: Connection | None = None

    def run(self, flow: Flow[R]) -> R:
        """Perform a flow to its end and return its result."""
        result: Any = None
        error: BaseException | None = None
        try:
            while True:
                operation = flow.send(result) if error is None else flow.throw(error)
                result, error = self.perform(operation)
        except StopIteration as end:
            return cast(R, end.value)
        finally:
            flow.close()

    def perform(self, operation: Operation) -> tuple[Any, Exception | None]:
        """Return the result of an operation, or the error that the flow shall see."""
        try:
            return self._perform(operation), None
        except grpc.RpcError as error:
            return None, from_rpc_error(error)
        except Exception as error:
            return None, error

    def close(self) -> None:
        """Close the channels; running calls end as cancelled."""
        with self._lock:
            connection, self._connection = self._connection, None
        for channel in connection.channels if connection else ():
            channel.close()

    def _perform(self, operation: Operation) -> Any:
        if isinstance(operation, Sleep):
            return time.sleep(operation.seconds)
        if isinstance(operation, Work):
            return operation.function()
        if isinstance(operation, Receive):
            return next(cast("Iterator[Message]", operation.stream), None)
        connection = self._connected()
        method = operation.pick(connection.stubs)
        if isinstance(operation, Invoke | Open):
            return method(operation.request, timeout=operation.timeout_seconds, metadata=connection.metadata)
        return _send(method, operation, connection)

    def _connected(self) -> Connection:
        with self._lock:
            if self._connection is None:
                self._connection = connect(self._config)
            return self._connection


def _send(method: Callable[..., Any], operation: Send, connection: Connection) -> Any:
    failures: list[Exception] = []

    def guarded() -> Iterator[Message]:
        # gRPC reads the messages in a thread of its own and would only log what they raise.
        try:
            yield from operation.messages
        except Exception as error:
            failures.append(error)
            raise

    try:
        return method(guarded(), timeout=operation.timeout_seconds, metadata=connection.metadata)
    except grpc.RpcError:
        if failures:
            raise failures[0] from None
        raise


class Stream(Generic[T]):
    """An iterator over items as they come.

    Closing it (or leaving its `with`) ends the call; the server is told.
    """

    def __init__(self, driver: SyncDriver, flow: StreamFlow[T]) -> None:
        self._driver = driver
        self._flow = flow

    def __iter__(self) -> Stream[T]:
        return self

    def __next__(self) -> T:
        result: Any = None
        error: Exception | None = None
        while True:
            operation = self._flow.send(result) if error is None else self._flow.throw(error)
            if isinstance(operation, Emit):
                return operation.item
            try:
                result, error = self._driver.perform(operation)
            except BaseException:
                self._flow.close()
                raise

    def __enter__(self) -> Stream[T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the call, if it is running. No more items come."""
        self._flow.close()


class SyncResource:
    """A group of methods on one driver."""

    def __init__(self, driver: SyncDriver) -> None:
        self._driver = driver

    def _run(self, build: Callable[Concatenate[Scope, P], Flow[R]], *args: P.args, **kwargs: P.kwargs) -> R:
        return self._driver.run(build(self._driver.scope, *args, **kwargs))

    def _stream(
        self, build: Callable[Concatenate[Scope, P], StreamFlow[T]], *args: P.args, **kwargs: P.kwargs
    ) -> Stream[T]:
        return Stream(self._driver, build(self._driver.scope, *args, **kwargs))


class method(Generic[P, R]):  # noqa: N801 - used like `property`
    """Makes a method of a resource from the function that builds its flow; the scope is filled in."""

    def __init__(self, build: Callable[Concatenate[Scope, P], Flow[R]]) -> None:
        self._build = build

    @overload
    def __get__(self, instance: None, owner: type) -> Callable[Concatenate[SyncResource, P], R]: ...
    @overload
    def __get__(self, instance: SyncResource, owner: type) -> Callable[P, R]: ...
    def __get__(self, instance: SyncResource | None, owner: type) -> Callable[..., R]:
        """Return the bound method, or the plain function when asked on the class."""
        build = self._build

        def run(resource: SyncResource, *args: P.args, **kwargs: P.kwargs) -> R:
            return resource._run(build, *args, **kwargs)

        return bound(run, build, instance)


class stream_method(Generic[P, T]):  # noqa: N801 - used like `property`
    """Makes a method that returns a `Stream` from the function that builds its flow."""

    def __init__(self, build: Callable[Concatenate[Scope, P], StreamFlow[T]]) -> None:
        self._build = build

    @overload
    def __get__(self, instance: None, owner: type) -> Callable[Concatenate[SyncResource, P], Stream[T]]: ...
    @overload
    def __get__(self, instance: SyncResource, owner: type) -> Callable[P, Stream[T]]: ...
    def __get__(self, instance: SyncResource | None, owner: type) -> Callable[..., Stream[T]]:
        """Return the bound method, or the plain function when asked on the class."""
        build = self._build

        def run(resource: SyncResource, *args: P.args, **kwargs: P.kwargs) -> Stream[T]:
            return resource._stream(build, *args, **kwargs)

        return bound(run, build, instance)


def bound(function: Callable[..., R], build: Callable[..., Any], instance: object | None) -> Callable[..., R]:
    """Bind `function` to `instance` under the name, text and signature of `build`, `self` for its scope."""
    named: Any = wraps(build)(function)
    signature = inspect.signature(build)
    parameters = list(signature.parameters.values())
    parameters[0] = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    named.__signature__ = signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty)
    return cast("Callable[..., R]", named if instance is None else named.__get__(instance))
