"""A receiver of OTLP over gRPC, for tests: whatever is sent to it, by whichever process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span


@dataclass(frozen=True, kw_only=True)
class Received:
    """A span, and which process sent it."""

    process: str
    span: Span

    @property
    def name(self) -> str:
        return self.span.name

    @property
    def trace_id(self) -> str:
        return self.span.trace_id.hex()

    @property
    def attributes(self) -> dict[str, Any]:
        return {
            one.key: getattr(one.value, str(one.value.WhichOneof("value"))) for one in self.span.attributes
        }


class Receiver(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps what it is sent."""

    def __init__(self) -> None:
        self.port = 0
        self._lock = threading.Lock()
        self._spans: list[Received] = []

    def Export(  # noqa: N802 - the method's name
        self, request: trace_service_pb2.ExportTraceServiceRequest, context: Any
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        with self._lock:
            for resource in request.resource_spans:
                names = {one.key: one.value.string_value for one in resource.resource.attributes}
                for scope in resource.scope_spans:
                    self._spans += [
                        Received(process=names["service.name"], span=span) for span in scope.spans
                    ]
        return trace_service_pb2.ExportTraceServiceResponse()

    def of(self, trace_id: str) -> list[Received]:
        """What is known of a trace so far."""
        with self._lock:
            return [one for one in self._spans if one.trace_id == trace_id]

    def once(
        self, trace_id: str, is_whole: Callable[[list[Received]], bool], seconds: float = 30.0
    ) -> list[Received]:
        """A trace as soon as it is whole; as it is, when it does not become so: processes send every few seconds."""
        deadline = time.monotonic() + seconds
        while not is_whole(found := self.of(trace_id)) and time.monotonic() < deadline:
            time.sleep(0.1)
        return found


@contextmanager
def receiving() -> Iterator[Receiver]:
    """Receive for the length of a block."""
    receiver = Receiver()
    server = grpc.server(ThreadPoolExecutor(4))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(receiver, server)  # type: ignore[no-untyped-call]
    receiver.port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield receiver
    finally:
        server.stop(1).wait()
