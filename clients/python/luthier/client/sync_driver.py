"""Does what flows ask for over `grpc`, in the calling thread, and turns flows into methods and iterators."""

from __future__ import annotations

import inspect
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import wraps
from types import TracebackType
from typing import TYPE_CHECKING, Any, Concatenate, Generic, ParamSpec, TypeVar, cast, overload

import grpc

from luthier.client.channels import Connection, connect
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
from luthier.client.notebooks import MOST_ROWS, listing_html
from luthier.client.spans import CallSpan, calling, opening
from luthier.client.wire_errors import from_rpc_error

if TYPE_CHECKING:
    from luthier.client.config import ClientConfig

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


class SyncDriver:
    """A `Driver` that blocks, and owns the channels of one sync client. May be used by many threads at once."""

    def __init__(self, config: ClientConfig) -> None:
        self._config = config
        self._lock = threading.Lock()
        self._connection: Connection | None = None

    def scope(self) -> Scope:
        """Return the scope of a new flow."""
        return Scope.of(self, self._config)

    async def invoke(self, pick: UnaryPick[Q, M], request: Q, timeout_seconds: float) -> M:
        """Make a unary call."""
        connection = self._connected()
        with calling(pick) as carried, _translated():
            metadata = connection.metadata + carried
            return pick(connection.stubs)(request, timeout=timeout_seconds, metadata=metadata)

    async def send(self, pick: SendPick[Q, M], messages: Iterator[Q], timeout_seconds: float) -> M:
        """Make a client-streaming call."""
        connection = self._connected()
        failures: list[Exception] = []
        with calling(pick) as carried, _translated(failures):
            metadata = connection.metadata + carried
            return pick(connection.stubs)(
                _guarded(messages, failures), timeout=timeout_seconds, metadata=metadata
            )

    async def open(self, pick: StreamPick[Q, M], request: Q, timeout_seconds: float | None) -> OpenStream[M]:
        """Begin a server-streaming call."""
        connection = self._connected()
        with opening(pick) as span:
            metadata = connection.metadata + span.metadata
            return _Messages(
                pick(connection.stubs)(request, timeout=timeout_seconds, metadata=metadata), span
            )

    async def sleep(self, seconds: float) -> None:
        """Wait."""
        time.sleep(seconds)  # noqa: ASYNC251 - there is no event loop

    async def work(self, function: Callable[[], R]) -> R:
        """Run a function."""
        return function()

    def close(self) -> None:
        """Close the channels; running calls end as cancelled."""
        with self._lock:
            connection, self._connection = self._connection, None
        for channel in connection.channels if connection else ():
            channel.close()

    def _connected(self) -> Connection:
        with self._lock:
            if self._connection is None:
                self._connection = connect(self._config)
            return self._connection


@dataclass(frozen=True, slots=True)
class _Messages(Generic[M]):
    running: Any
    span: CallSpan

    async def receive(self) -> M | None:
        try:
            message = cast("M | None", next(self.running, None))
        except grpc.RpcError as error:
            told = from_rpc_error(error)
            self.span.end(told)
            raise told from error
        if message is None:
            self.span.end()
        return message

    def cancel(self) -> None:
        self.running.cancel()
        self.span.end()


@contextmanager
def _translated(failures: Sequence[Exception] = ()) -> Iterator[None]:
    """Raise what a call raised as an error of the tree; where `failures` has one, that."""
    try:
        yield
    except grpc.RpcError as error:
        raise failures[0] if failures else from_rpc_error(error) from error


def _guarded(messages: Iterator[Q], failures: list[Exception]) -> Iterator[Q]:
    # gRPC reads the messages in a thread of its own and would only log what they raise.
    try:
        yield from messages
    except Exception as error:
        failures.append(error)
        raise


def finished(flow: Coroutine[Any, Any, R]) -> R:
    """Run a flow whose driver blocks to its end, and return its result."""
    try:
        flow.send(None)
    except StopIteration as end:
        return cast(R, end.value)
    raise AssertionError("a flow waits through its driver alone")


class Stream(Generic[T]):
    """An iterator over items as they come.

    Closing it (or leaving its `with`) ends the call; the server is told.
    """

    def __init__(self, flow: StreamFlow[T], running: Running) -> None:
        self._flow = flow
        self._running = running

    def __iter__(self) -> Stream[T]:
        return self

    def __next__(self) -> T:
        try:
            return finished(anext(self._flow))
        except StopAsyncIteration:
            raise StopIteration from None

    def __enter__(self) -> Stream[T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the call, if it is running. No more items come; a thread that waits for one gets Cancelled."""
        self._running.cancel()
        with suppress(RuntimeError):  # the flow is running in another thread
            finished(self._flow.aclose())


class Listing(Stream[T]):
    """The items of all pages; in a notebook a table of the first ones, which come all the same when it is read."""

    def __init__(self, flow: StreamFlow[T], running: Running) -> None:
        super().__init__(flow, running)
        self._shown: deque[T] = deque()
        self._failure: BaseException | None = None

    def __next__(self) -> T:
        if self._shown:
            return self._shown.popleft()
        if self._failure is not None:
            # The flow has ended with it: it would say that there are no more items.
            raise self._failure
        return super().__next__()

    def close(self) -> None:
        """End the listing: no more items come, of those that were shown neither."""
        self._shown.clear()
        self._failure = None
        super().close()

    def _repr_html_(self) -> str | None:
        with suppress(StopIteration):
            while len(self._shown) <= MOST_ROWS and self._failure is None:
                self._shown.append(self._read_ahead())
        if self._failure is not None:
            raise self._failure
        return listing_html(tuple(self._shown))

    def _read_ahead(self) -> T:
        try:
            return super().__next__()
        except StopIteration:
            raise
        except BaseException as error:  # an interrupt too: the flow ends with whatever it is
            self._failure = error
            raise


class SyncResource:
    """A group of methods on one driver."""

    def __init__(self, driver: SyncDriver) -> None:
        self._driver = driver


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
            return finished(build(resource._driver.scope(), *args, **kwargs))

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
            scope = resource._driver.scope()
            return self._made(build(scope, *args, **kwargs), scope.running)

        return bound(run, build, instance)

    def _made(self, flow: StreamFlow[T], running: Running) -> Stream[T]:
        return Stream(flow, running)


class list_method(stream_method[P, T]):  # noqa: N801 - used like `property`
    """Makes a method that returns a `Listing` from the function that builds a flow of `pages`, which end."""

    def _made(self, flow: StreamFlow[T], running: Running) -> Stream[T]:
        return Listing(flow, running)


def bound(function: Callable[..., R], build: Callable[..., Any], instance: object | None) -> Callable[..., R]:
    """Bind `function` to `instance` under the name, text and signature of `build`, `self` for its scope."""
    named: Any = wraps(build)(function)
    signature = inspect.signature(build)
    parameters = list(signature.parameters.values())
    parameters[0] = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    named.__signature__ = signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty)
    return cast("Callable[..., R]", named if instance is None else named.__get__(instance))
