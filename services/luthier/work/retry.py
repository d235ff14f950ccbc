"""Repeat blocking calls to another service while it is away."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import grpc

from luthier.work.peers import is_passing, peer_error_of

T = TypeVar("T")
PATIENCE_SECONDS = 120.0


def retrying(call: Callable[[], T], patience_seconds: float = PATIENCE_SECONDS) -> T:
    """Return what `call` returns, repeating it while the service is away, for at most `patience_seconds`.

    Raises:
        LuthierError: what the service answered, as the error tree.
    """
    deadline = time.monotonic() + patience_seconds
    delay_seconds = 0.2
    while True:
        try:
            return call()
        except grpc.RpcError as error:
            if not is_passing(error) or time.monotonic() + delay_seconds > deadline:
                raise peer_error_of(error, "the other service") from error
        time.sleep(delay_seconds)
        delay_seconds = min(delay_seconds * 2, 5.0)
