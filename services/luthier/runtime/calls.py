"""One RPC as the server sees it, whichever of the four kinds it is, and the stages that it passes through.

A stage is an async context manager around the rest of the call. grpc.aio's own interceptors wrap handlers, and
each would have to know the four kinds and both ways to write a stream; here only `StagedMethods` does. It is a
handler and no interceptor: a chain of those is coroutines more for each call that is refused.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, TypeAlias

import grpc
from google.protobuf.message import DecodeError
from grpc import aio

from luthier.errors import DeadlineExceeded, InvalidArgument
from luthier.runtime.auth import Principal
from luthier.runtime.door import admit

BODY_SECONDS = 20.0

CallType = Literal["unary", "client_stream", "server_stream", "bidi_stream"]


Metadata = Iterable[tuple[str, str | bytes]]
Measure = Callable[[float], object]
"""Told a size in bytes."""


def call_type(handler: grpc.RpcMethodHandler[Any, Any]) -> CallType:
    """Return the kind of a method, in the words of the `grpc_type` label."""
    if handler.request_streaming:
        return "bidi_stream" if handler.response_streaming else "client_stream"
    return "server_stream" if handler.response_streaming else "unary"


@dataclass(slots=True, kw_only=True, eq=False)
class Call:
    """A call in progress. Stages fill in what later stages, the log and the metrics need.

    `subject` is what it is about; `shed_by` names the pool that had no slot for it, `detail` says why it failed;
    `trace_id` is of the trace that keeps it; `measure_received` and `measure_sent` are told the size of each message,
    and are the same for all calls of a method;
    `examine` raises for a message of the request that who calls may not send; `caller` is who that is, where it was
    found out before the stages.
    """

    method: str
    type: CallType
    context: aio.ServicerContext[Any, Any]
    messages: AsyncIterator[bytes]
    streams_requests: bool
    deserialize: Callable[[bytes], Any]
    task: asyncio.Task[Any] | None
    caller: Principal | None = None
    request: Any | None = None
    request_id: str = ""
    principal: str = ""
    subject: str = ""
    code: grpc.StatusCode = grpc.StatusCode.OK
    reason: str = ""
    detail: str = ""
    trace_id: str = ""
    received: int = 0
    sent: int = 0
    interrupted: bool = False
    shed_by: str = ""
    measure_received: Measure = lambda _: None
    measure_sent: Measure = lambda _: None
    examine: Callable[[Any], None] | None = None
    trailers: dict[str, str] = field(default_factory=dict)

    async def receive(self) -> None:
        """Read the message of a unary request into `request`; leave a stream of them to the handler.

        Read by us and not by gRPC, which would read before any stage could refuse, wait for ever for bytes that
        never come, and answer bytes that are no such message with UNKNOWN and the trace.

        Raises InvalidArgument for bytes that are no message and for none, DeadlineExceeded when they do not come.
        """
        if self.streams_requests:
            return
        try:
            async with asyncio.timeout(BODY_SECONDS):
                data = await anext(self.messages, None)
        except TimeoutError:
            raise DeadlineExceeded(
                f"the request must come within {BODY_SECONDS:.0f} s of the call's beginning"
            ) from None
        if data is None:
            raise InvalidArgument(
                f"a call of {self.method} must send one message, got none", metadata={"method": self.method}
            )
        self.received = 1
        self.request = self._admitted(data)
        self._examine(self.request)

    async def requests(self) -> AsyncIterator[Any]:
        """Yield the messages of a stream of requests."""
        async for data in self.messages:
            self.received += 1
            message = self._admitted(data)
            self._examine(message)
            yield message

    def _examine(self, message: Any) -> None:
        assert self.examine is not None, f"no stage has said what {self.method} may be about"
        self.examine(message)

    def _admitted(self, data: bytes) -> Any:
        self.measure_received(len(data))
        try:
            message = self.deserialize(data)
        except DecodeError as error:
            raise InvalidArgument(
                f"the request must be a message of {self.method}, got {len(data)} bytes that are none",
                metadata={"method": self.method},
            ) from error
        admit(message)
        return message

    def metadata(self, key: str) -> str | None:
        """Return the first value of a key in the call's metadata."""
        return first_value(self.context.invocation_metadata() or (), key)

    def interrupt(self) -> None:
        """End the call because the server stops; the caller is told to come again."""
        if self.task is not None and not self.interrupted:
            self.interrupted = True
            self.task.cancel()


def first_value(metadata: Metadata, key: str) -> str | None:
    """Return the first value of a key in metadata."""
    for name, value in metadata:
        if name == key:
            return value.decode(errors="replace") if isinstance(value, bytes) else value
    return None


Stage = Callable[[Call], AbstractAsyncContextManager[None]]

Answer = Callable[[Call, Callable[[], Awaitable[Any]]], Coroutine[Any, Any, Any]]
"""Around the handler of a unary call: may answer in its place."""

Refusal = Callable[[object, aio.ServicerContext[Any, Any]], Coroutine[Any, Any, None]]
"""In place of a method: ends a call without a look at its messages."""
Shed = Callable[[str, CallType, Metadata], Refusal | Principal | None]
"""By method, kind and metadata: how to end a call that need not come to the stages; or let it come, and who makes it
where that is known by then."""

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


@dataclass(frozen=True, slots=True, eq=False)
class _Method:
    type: CallType
    handler_for: Callable[[Principal | None], Handler]
    staged: Handler


class StagedMethods(grpc.GenericRpcHandler):
    """Runs every call through the stages, the first one outermost. Methods must be asynchronous."""

    def __init__(self, stages: Sequence[Stage], answer: Answer, shed: Shed = lambda *_: None) -> None:
        self._stages = tuple(stages)
        self._answer = answer
        self._shed = shed
        self._methods: dict[str, _Method] = {}

    def add(self, name: str, handler: Handler) -> Handler:
        """Take a method, `/luthier.v1.DataService/GetDataset`, with the handler that was generated for it.

        Returns the handler that runs it through the stages, for who registers it with gRPC itself.
        """
        type_ = call_type(handler)
        handler_for = self._staged(name, type_, handler)
        staged = handler_for(None)
        self._methods[name] = _Method(type_, handler_for, staged)
        return staged

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Handler | None:
        """Return how to answer a call that came; None where there is no such method, which gRPC then says."""
        name = handler_call_details.method
        method = self._methods.get(name)
        if method is None:
            return None
        found = self._shed(name, method.type, handler_call_details.invocation_metadata or ())
        if found is None:
            return method.staged
        if isinstance(found, Principal):
            return method.handler_for(found)
        return grpc.stream_unary_rpc_method_handler(found)

    def _staged(self, name: str, type_: CallType, handler: Handler) -> Callable[[Principal | None], Handler]:
        deserialize = handler.request_deserializer
        assert deserialize is not None, "methods of generated servicers have a deserializer"
        run = self._run_stream if handler.response_streaming else self._run_unary
        behavior = _behavior(handler, type_)
        serializer = _Serializer(handler.response_serializer)

        async def staged(
            caller: Principal | None, messages: AsyncIterator[bytes], context: aio.ServicerContext[Any, Any]
        ) -> Any:
            call = Call(
                caller=caller,
                method=name,
                type=type_,
                context=context,
                messages=messages,
                streams_requests=handler.request_streaming,
                deserialize=deserialize,
                task=asyncio.current_task(),
            )
            async with AsyncExitStack() as stack:
                for stage in self._stages:
                    await stack.enter_async_context(stage(call))
                serializer.measure = call.measure_sent
                return await run(call, behavior)
            raise AssertionError("no stage swallows an exception")

        # To gRPC every request is a stream: on the wire it is, and the stages come before the first message.
        wrap = (
            grpc.stream_stream_rpc_method_handler
            if handler.response_streaming
            else grpc.stream_unary_rpc_method_handler
        )
        return lambda caller: wrap(
            partial(staged, caller),
            request_deserializer=None,
            response_serializer=serializer,
        )

    async def _run_unary(self, call: Call, behavior: Callable[..., Any]) -> Any:
        if call.type == "unary":
            response = await self._answer(call, lambda: behavior(call.request, call.context))
        else:
            response = await behavior(call.requests(), call.context)
        call.sent = 1
        return response

    async def _run_stream(self, call: Call, behavior: Callable[..., Any]) -> None:
        request = call.requests() if call.streams_requests else call.request
        writing = _Writing(call)
        if not inspect.isasyncgenfunction(behavior):
            await behavior(request, writing)
            return
        # Closed at once, not by the garbage collector, when the caller goes away.
        async with aclosing(behavior(request, call.context)) as responses:
            async for response in responses:
                await writing.write(response)


class _Writing:
    """The context of a call, counting what is written."""

    def __init__(self, call: Call) -> None:
        self._call = call

    async def write(self, response: Any) -> None:
        await self._call.context.write(response)
        self._call.sent += 1

    def __getattr__(self, name: str) -> Any:
        return getattr(self._call.context, name)


class _Serializer:
    """Passes bytes through, as replayed answers and events are stored as they go over the wire; has sizes measured.

    One for all calls of a method, which are measured alike.
    """

    def __init__(self, serialize: Callable[[Any], bytes] | None) -> None:
        assert serialize is not None, "methods of generated servicers have a serializer"
        self._serialize = serialize
        self.measure: Measure = lambda _: None

    def __call__(self, response: Any) -> bytes:
        data = response if isinstance(response, bytes) else self._serialize(response)
        self.measure(len(data))
        return data


def _behavior(handler: grpc.RpcMethodHandler[Any, Any], type_: CallType) -> Callable[..., Any]:
    behavior = {
        "unary": handler.unary_unary,
        "client_stream": handler.stream_unary,
        "server_stream": handler.unary_stream,
        "bidi_stream": handler.stream_stream,
    }[type_]
    assert behavior is not None
    return behavior
