"""How long calls wait inside gRPC before anybody here sees them, measured by calls of the server's own.

gRPC takes in one call at a time, in several turns of the event loop; those that wait for that are seen by no stage.
So while others come, the server sends itself a call now and then, which stands in the same queue: its wait is theirs.
What is held down is the sojourn time, as in CoDel (Nichols and Jacobson, "Controlling Queue Delay", ACM Queue, 2012).
"""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from time import monotonic

import grpc
from grpc import aio

_CALM_SECONDS = 0.05
_CROWD_SECONDS = 0.02
_CALM_CALLS = 4
_CROWDED_FOR_SECONDS = 0.25
_FLOOD_SECONDS = 0.02
_FLOOD_OVER_SECONDS = 0.005
_STALL_SECONDS = 0.05
_AGAIN_SECONDS = 0.01
_RECENT_SECONDS = 1.0
_FEWEST_AHEAD = 16
_LONGEST_SECONDS = 10.0
# Channels of one process share a connection unless told not to; and no proxy stands between a server and itself.
_OPTIONS = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0)]
_Call = aio.UnaryUnaryMultiCallable[bytes, bytes]
_logger = logging.getLogger(__name__)


class Intake(grpc.GenericRpcHandler):
    """What is known of the calls that wait to be taken in. For one event loop.

    Behind the server's other handlers it sees the calls that no method is for, its own among them.
    """

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        # Nobody else can know it, and end a wait that is not theirs.
        self.method = f"/luthier.Intake/{secrets.token_hex(16)}"
        self._clock = clock
        self._calls = 0
        self._came = asyncio.Event()
        self._crowded_at = -math.inf
        self._sent_at: float | None = None
        self._waits = (0.0, 0.0)
        self._ahead = 0
        self._waited = 0.0
        self._flooded = False
        self._flooded_at = -math.inf

    def arrived(self) -> None:
        """Count a call that was taken in, and that could have been refused: a unary one with a key."""
        self._calls += 1
        self._ahead += 1
        if self._calls == _CALM_CALLS:
            self._came.set()

    def crowded(self, now: float) -> None:
        """Say that one came who could not be let in: from now on it is measured more often."""
        self._crowded_at = now

    def wait_seconds(self, now: float) -> float:
        """Return how long the server's own call waited last, or waits by now if that is longer."""
        return max(self._waited, 0.0 if self._sent_at is None else now - self._sent_at)

    def is_flooded(self, now: float) -> bool:
        """Tell whether calls come faster than they are taken in beside those that run.

        It begins when two waits running are long, as one alone may be a stall, or one is very long. It ends with one
        that is short, and for a second takes little to begin anew: those who made it are still there. A wait in which
        few calls were taken in is none of theirs: then the machine is busy otherwise, and to refuse them would help
        nobody.
        """
        before, last = self._waits
        if self._sent_at is not None and self._ahead >= _FEWEST_AHEAD:
            waits_by_now = now - self._sent_at
            before, last = last, max(waits_by_now, last if self._flooded else 0.0)
        if self._flooded:
            self._flooded = last > _FLOOD_OVER_SECONDS
        elif now - self._flooded_at < _RECENT_SECONDS:
            self._flooded = last > _AGAIN_SECONDS
        else:
            self._flooded = min(before, last) > _FLOOD_SECONDS or last > _STALL_SECONDS
        if self._flooded:
            self._flooded_at = now
        return self._flooded

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> None:
        """See the server's own call come in. It has no method, so gRPC ends it."""
        if handler_call_details.method == self.method and self._sent_at is not None:
            self._over(self._clock() - self._sent_at)

    @asynccontextmanager
    async def measured(self, address: str) -> AsyncIterator[None]:
        """Measure at the server's own address for the length of a block."""
        measuring = asyncio.create_task(self._measure(address))
        try:
            yield
        finally:
            measuring.cancel()
            await asyncio.wait([measuring])

    async def _measure(self, address: str) -> None:
        while True:
            try:
                await self._measure_by_one_channel(address)
            except Exception:
                self._forget()
                _logger.exception(
                    "it cannot be measured how long calls wait; tried again in %g s", _LONGEST_SECONDS
                )
                await asyncio.sleep(_LONGEST_SECONDS)

    async def _measure_by_one_channel(self, address: str) -> None:
        async with aio.insecure_channel(address, options=_OPTIONS) as channel:
            call: _Call = channel.unary_unary(self.method)
            while True:
                await self._due()
                await self._send(call)

    async def _due(self) -> None:
        if self._waits[1] > _FLOOD_OVER_SECONDS:
            return
        self._calls = 0
        self._came.clear()
        is_crowd = self._clock() - self._crowded_at < _CROWDED_FOR_SECONDS
        await asyncio.sleep(_CROWD_SECONDS if is_crowd else _CALM_SECONDS)
        if not self._came.is_set():
            self._forget()
            await self._came.wait()

    async def _send(self, call: _Call) -> None:
        self._sent_at, self._ahead = self._clock(), 0
        try:
            await call(b"", timeout=_LONGEST_SECONDS)
        except aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                self._over(_LONGEST_SECONDS)
            elif error.code() is not grpc.StatusCode.UNIMPLEMENTED:
                # The server stops, or the connection broke: that says nothing about the queue.
                self._forget()

    def _over(self, seconds: float) -> None:
        self._waits = (self._waits[1], seconds if self._ahead >= _FEWEST_AHEAD else 0.0)
        self._waited = seconds
        self._sent_at = None

    def _forget(self) -> None:
        self._sent_at, self._waits, self._waited = None, (0.0, 0.0), 0.0
