"""Calls to other services: channels, credentials, and their errors as the error tree."""

from __future__ import annotations

from typing import Any

import grpc
from google.rpc import status_pb2

from luthier.errors import LuthierError
from luthier.work.convert import status_to_failure

CHANNEL_OPTIONS = [
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2_000),
]
_DETAILS_KEY = "grpc-status-details-bin"


def channel(address: str) -> grpc.Channel:
    """Open a channel for blocking calls."""
    return grpc.insecure_channel(address, options=CHANNEL_OPTIONS)


def aio_channel(address: str) -> grpc.aio.Channel:
    """Open a channel for calls from an event loop."""
    return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    """Return the metadata that carries a credential."""
    return (("authorization", f"Bearer {token}"),)


def error_of(call_error: grpc.RpcError) -> LuthierError:
    """Read the error that the other service raised.

    Its details come as google.rpc.Status in the trailing metadata; without them the code alone decides.
    """
    call: Any = call_error
    status = status_pb2.Status(code=call.code().value[0], message=call.details() or "")
    for key, value in call.trailing_metadata() or ():
        if key == _DETAILS_KEY:
            status.ParseFromString(value)
    return status_to_failure(status).to_error()


def is_passing(call_error: grpc.RpcError) -> bool:
    """Tell whether the same call may well succeed a moment later."""
    call: Any = call_error
    return call.code() in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}
