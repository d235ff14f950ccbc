"""The quick way to refuse: of callers with a key, when their gate is crowded, before any stage of the call.

Who is flooded has little time for each call that it cannot take. This path reads no body, makes no request id, builds
no status: it picks one of a few that are ready.
"""

from __future__ import annotations

import random
import time
from functools import cache
from typing import Any

import grpc
from grpc import aio

from luthier.errors import LuthierError
from luthier.runtime.admission import Admission, Pool, overloaded
from luthier.runtime.auth import Authenticator, Principal
from luthier.runtime.call_metrics import CallMetrics
from luthier.runtime.calls import CallType, Metadata, Refusal, first_value
from luthier.runtime.interceptors import AccessLog
from luthier.runtime.status import printable, to_trailer

_RETRY_TENTHS = range(2, 11)


class Shedding:
    """Ends unary calls that would find no slot. Called before the stages, of every call that has no lane of its own."""

    def __init__(
        self, authenticator: Authenticator, admission: Admission, metrics: CallMetrics, log: AccessLog
    ) -> None:
        self._authenticator = authenticator
        self._admission = admission
        self._metrics = metrics
        self._log = log

    def __call__(self, method: str, call_type: CallType, metadata: Metadata) -> Refusal | Principal | None:
        """Return how to refuse a call, or who makes it, of which the stages say what else is wrong.

        None for who is not refused here: the stages find out who it is. A task's token ends by the clock, and is
        looked at there alone, where the call begins.
        """
        if call_type != "unary":
            return None
        try:
            principal = self._authenticator.key_holder(first_value(metadata, "authorization"))
        except LuthierError:
            return None
        if principal is None or principal.kind != "key":
            return principal
        self._admission.arrived()
        gate = self._admission.gate(call_type, method, "key")
        if not gate.is_crowded():
            return principal

        async def refuse(_: object, context: aio.ServicerContext[Any, Any]) -> None:
            self._admission.refused(gate)
            self._metrics.shed(method, call_type)
            self._log.shed(method, principal, time.perf_counter())
            message, trailers = random.choice(_ready(gate.pool))
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, message, trailers)

        return refuse


@cache
def _ready(pool: Pool) -> tuple[tuple[str, tuple[tuple[str, bytes], ...]], ...]:
    errors = (overloaded(pool, tenths / 10) for tenths in _RETRY_TENTHS)
    return tuple((printable(error.message), (to_trailer(error),)) for error in errors)
