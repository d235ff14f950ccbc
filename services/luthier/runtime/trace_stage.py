"""The stage that keeps a span of each call."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext

import grpc

from luthier.runtime import tracing
from luthier.runtime.admission import HEALTH_SERVICE
from luthier.runtime.calls import Call
from luthier.runtime.logs import bind

_WORKERS_CHATTER = frozenset(
    f"/luthier.worker.v1.WorkerService/{method}"
    for method in ("ClaimTask", "Heartbeat", "PushGeneration", "ReportEvents", "TakeGenerations")
)
"""Calls that workers make every second for days: their spans would hide the others of an attempt."""
_FAULTS = frozenset(
    {
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DATA_LOSS,
    }
)
"""Codes that are errors of a server, as OpenTelemetry's conventions have it: the others are its answers."""


@asynccontextmanager
async def trace_stage(call: Call) -> AsyncIterator[None]:
    """Keep a span of the call, of its caller's trace or of one that begins here; its id is in the log."""
    if call.method in _WORKERS_CHATTER or call.method.startswith(HEALTH_SERVICE):
        yield
        return
    _, service, method = call.method.split("/")
    attributes = {
        "rpc.system": "grpc",
        "rpc.service": service,
        "rpc.method": method,
        "luthier.request_id": call.request_id,
    }
    parent = call.metadata(tracing.HEADER) or ""
    with tracing.span(call.method[1:], kind="server", parent=parent, attributes=attributes) as span:
        call.trace_id = span.trace_id
        try:
            with bind(trace_id=span.trace_id) if span.trace_id else nullcontext():
                yield
        finally:
            span.note(
                {
                    "rpc.grpc.status_code": call.code.value[0],
                    "luthier.reason": call.reason,
                    "luthier.principal": call.principal,
                    "luthier.messages_received": call.received,
                    "luthier.messages_sent": call.sent,
                }
            )
            if call.code in _FAULTS:
                span.failed(call.reason or call.code.name)
