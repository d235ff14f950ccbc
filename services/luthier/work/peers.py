"""Calls to other services: channels, credentials, and their errors as the error tree."""

from __future__ import annotations

import logging
import random
from typing import Any, cast

import grpc

from luthier.errors import LuthierError, PermissionDenied, Reason, Unauthenticated, Unavailable
from luthier.errors.status import FailedCall, status_of_call, status_to_failure
from luthier.runtime import tracing

CHANNEL_OPTIONS = [
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2_000),
]
_RETRY_SECONDS = 2.0
_logger = logging.getLogger(__name__)
_LONGEST_ASKED_SECONDS = 60.0
_FINAL = frozenset(
    {
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.ALREADY_EXISTS,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.OUT_OF_RANGE,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.DATA_LOSS,
    }
)


def channel(address: str) -> grpc.Channel:
    """Open a channel for blocking calls."""
    return grpc.insecure_channel(address, options=CHANNEL_OPTIONS)


def aio_channel(address: str) -> grpc.aio.Channel:
    """Open a channel for calls from an event loop."""
    return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    """Return the metadata that carries a credential, and the trace that the call is part of, if any."""
    return (("authorization", f"Bearer {token}"), *tracing.carried())


def error_of(call_error: grpc.RpcError) -> LuthierError:
    """Read the error that the other service raised, less its field violations: they are of a request of ours.

    Without its details the code alone decides.
    """
    call = cast(FailedCall, call_error)
    return status_to_failure(status_of_call(call)).to_error()


def peer_error_of(call_error: grpc.RpcError, peer: str) -> LuthierError:
    """Read why a call that a service or a worker made to `peer` of its own accord failed.

    The credential of such a call is ours, never the user's: that `peer` refuses it is our fault, which keys or
    clocks that are set right may end, and is told as Unavailable PEER_REFUSED.
    """
    told = error_of(call_error)
    if not isinstance(told, Unauthenticated | PermissionDenied):
        return told
    _logger.error("a peer refuses our credential", extra={"peer": peer, "detail": told.message})
    return Unavailable(
        f"{peer} refuses this process's own credential ({told.message}): all processes must share the keys of one "
        "home, and their clocks must agree",
        reason=Reason.PEER_REFUSED,
        metadata={"peer": peer},
        retry_after_seconds=_RETRY_SECONDS,
    )


def service_error_of(call_error: grpc.RpcError, peer: str) -> LuthierError:
    """Read why a call that a service made for a user failed, as that user is to see it.

    As `peer_error_of`, and a peer that does not answer is Unavailable SERVICE_UNAVAILABLE.
    """
    if not is_passing(call_error):
        return peer_error_of(call_error, peer)
    call: Any = call_error
    return Unavailable(
        f"{peer} must answer, it is away: {call.details()}",
        reason=Reason.SERVICE_UNAVAILABLE,
        metadata={"peer": peer},
        retry_after_seconds=_RETRY_SECONDS,
    )


def is_passing(call_error: grpc.RpcError) -> bool:
    """Tell whether the service was away or too slow: the same call may well succeed a moment later."""
    call: Any = call_error
    return call.code() in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}


def is_final(call_error: grpc.RpcError) -> bool:
    """Tell whether the answer is about the call itself, so that the same call gets the same answer."""
    call: Any = call_error
    return call.code() in _FINAL


def is_fault(call_error: grpc.RpcError) -> bool:
    """Tell whether the service failed in a way that may pass, or may be the same for ever."""
    call: Any = call_error
    return call.code() in {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN}


class Backoff:
    """How long to wait before each further try: longer each time, and at least as long as the service asks."""

    def __init__(self, first_seconds: float = 0.1, longest_seconds: float = 3.0) -> None:
        self._next_seconds = first_seconds
        self._longest_seconds = longest_seconds

    def after(self, error: LuthierError) -> float:
        """Return the seconds to wait after one more failure."""
        seconds = self._next_seconds * random.uniform(0.8, 1.2)
        self._next_seconds = min(self._next_seconds * 2, self._longest_seconds)
        return max(seconds, min(error.retry_after_seconds or 0.0, _LONGEST_ASKED_SECONDS))
