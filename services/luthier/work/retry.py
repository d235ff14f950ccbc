"""Repeat blocking calls to another service until it answers for good."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import grpc

from luthier.errors import Unavailable
from luthier.work.peers import Backoff, is_final, peer_error_of

T = TypeVar("T")
PATIENCE_SECONDS = 120.0


def retrying(call: Callable[[], T], patience_seconds: float = PATIENCE_SECONDS) -> T:
    """Return what `call` returns, repeating it for at most `patience_seconds` unless the answer is final.

    Raises:
        Unavailable: it did not answer in time; the reason is that of its last answer.
        LuthierError: its final answer, as the error tree.
    """
    deadline = time.monotonic() + patience_seconds
    backoff = Backoff(0.2, 5.0)
    while True:
        try:
            return call()
        except grpc.RpcError as refused:
            error = peer_error_of(refused, "the other service")
            delay_seconds = backoff.after(error)
            if is_final(refused):
                raise error from refused
            if time.monotonic() + delay_seconds > deadline:
                # Whatever it was, it may pass: a task that met it is tried again, not failed.
                raise Unavailable(error.message, reason=error.reason, metadata=error.metadata) from refused
        time.sleep(delay_seconds)
