"""Who is let in when many come: slots by kind of caller, waits that are short, refusals that are quick.

gRPC's own limit of concurrent calls cannot tell callers apart, and answers without a reason. Here each kind of
caller has slots that no other kind can take, so that health checks and workers go on while users wait, and callers
without a key cannot stand in the way of those with one.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cache
from time import monotonic
from typing import Literal

from google.protobuf import descriptor_pool
from prometheus_client import CollectorRegistry
from prometheus_client import Counter as MetricCounter
from prometheus_client import Gauge as MetricGauge

from luthier.errors import Reason, ResourceExhausted
from luthier.runtime.auth import Kind, current_principal
from luthier.runtime.calls import Call

Pool = Literal["probes", "probe_streams", "workers", "reads", "writes", "streams"]

HEALTH_SERVICE = "/grpc.health.v1.Health/"

# Spread, so that those who were refused together do not come back together.
_RETRY_SECONDS = (0.2, 1.0)
_FIRST_GUESS_SECONDS = 0.005
_SMOOTHING = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Slots:
    """How many calls of a kind run, and how long others wait for them.

    Attributes:
        running: calls at once.
        wait_seconds: longest wait of a burst for a slot, and the longest expected one that is begun; 0: none waits.
        overload_wait_seconds: the same once somebody has always been waiting for `burst_seconds`.
        burst_seconds: how long a queue may stand before it is overload and no burst.
        patience_seconds: a call that has run this long waits for something else than this process, and no longer
            counts as running but as `lingering`; 0: never.
        lingering: such calls at once, besides those that run.
        per_address: calls at once from one address; 0: no limit.
    """

    running: int
    wait_seconds: float = 0.0
    overload_wait_seconds: float = 0.0
    burst_seconds: float = 0.5
    patience_seconds: float = 0.0
    lingering: int = 0
    per_address: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The slots of each kind of caller.

    Attributes:
        probes: health checks, from anybody.
        probe_streams: health watches, from anybody.
        workers: every call of workers and on behalf of tasks.
        reads: unary calls with a key that change nothing.
        writes: unary calls with a key that change something: they wait for one another in the database.
        streams: streaming calls with a key.
    """

    probes: Slots = Slots(running=64)
    probe_streams: Slots = Slots(running=64, per_address=32)
    workers: Slots = Slots(running=1024)
    reads: Slots = Slots(
        running=4,
        wait_seconds=0.15,
        overload_wait_seconds=0.02,
        patience_seconds=0.15,
        lingering=128,
    )
    writes: Slots = Slots(
        running=4,
        wait_seconds=0.15,
        overload_wait_seconds=0.02,
        patience_seconds=0.5,
        lingering=64,
    )
    streams: Slots = Slots(running=2048)

    @property
    def most(self) -> int:
        """Calls that can be in progress at once, those that wait not counted."""
        every = (self.probes, self.probe_streams, self.workers, self.reads, self.writes, self.streams)
        return sum(slots.running + slots.lingering for slots in every)


class AdmissionMetrics:
    """Counts who was refused, and shows who is in."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.refused = MetricCounter(
            "luthier_calls_refused", "Calls refused because no slot was free.", ["pool"], registry=registry
        )
        self.running = MetricGauge(
            "luthier_calls_running", "Calls that hold a slot.", ["pool"], registry=registry
        )
        self.waiting = MetricGauge(
            "luthier_calls_waiting", "Calls that wait for a slot.", ["pool"], registry=registry
        )

    def follow(self, pool: Pool, gate: Gate) -> None:
        """Create a pool's series, and show its gate whenever somebody looks."""
        self.refused.labels(pool)
        self.running.labels(pool).set_function(lambda: gate.running)
        self.waiting.labels(pool).set_function(lambda: gate.waiting)


@dataclass(slots=True, eq=False)
class _Ticket:
    began: float
    address: str
    lingers: bool = False


@dataclass(slots=True, eq=False)
class _Waiter:
    address: str
    slot: asyncio.Future[_Ticket | None]


class Gate:
    """The slots of one kind of caller. Use from one event loop."""

    def __init__(self, pool: Pool, slots: Slots, clock: Callable[[], float] = monotonic) -> None:
        self.pool = pool
        self._slots = slots
        self._clock = clock
        # In order of beginning: the first has run longest.
        self._running: dict[_Ticket, None] = {}
        self._lingering = 0
        self._waiters: deque[_Waiter] = deque()
        self._by_address: Counter[str] = Counter()
        self._seconds = _FIRST_GUESS_SECONDS
        self._queued_since: float | None = None

    @property
    def running(self) -> int:
        """Calls that hold a slot."""
        return len(self._running) + self._lingering

    @property
    def waiting(self) -> int:
        """Calls that wait for one."""
        return len(self._waiters)

    async def enter(self, address: str) -> _Ticket:
        """Take a slot, at once or after a short wait. Raises ResourceExhausted OVERLOADED with a time to return."""
        now = self._clock()
        if self._slots.per_address and self._by_address[address] >= self._slots.per_address:
            raise self._refusal(f"{self._slots.per_address} of them from one address")
        if not self._waiters and self._has_room(now):
            return self._take(address, now)
        if self._expected_wait() > self._longest_wait(now):
            raise self._refusal()
        return await self._wait(address, now)

    def leave(self, ticket: _Ticket) -> None:
        """Give a slot back; the call that has waited longest gets it."""
        now = self._clock()
        if self._slots.per_address:
            self._by_address[ticket.address] -= 1
            if not self._by_address[ticket.address]:
                del self._by_address[ticket.address]
        if ticket.lingers:
            self._lingering -= 1
        else:
            del self._running[ticket]
            self._seconds += _SMOOTHING * (now - ticket.began - self._seconds)
        self._hand_on(now)

    def _take(self, address: str, now: float) -> _Ticket:
        ticket = _Ticket(now, address)
        self._running[ticket] = None
        if self._slots.per_address:
            self._by_address[address] += 1
        return ticket

    def _has_room(self, now: float) -> bool:
        while len(self._running) >= self._slots.running:
            oldest = next(iter(self._running))
            is_patient = 0 < self._slots.patience_seconds <= now - oldest.began
            if not is_patient or self._lingering >= self._slots.lingering:
                return False
            del self._running[oldest]
            oldest.lingers = True
            self._lingering += 1
        return True

    async def _wait(self, address: str, now: float) -> _Ticket:
        loop = asyncio.get_running_loop()
        waiter = _Waiter(address, loop.create_future())
        if not self._waiters:
            self._queued_since = now
        self._waiters.append(waiter)
        timer = loop.call_later(self._longest_wait(now), self._expire, waiter)
        try:
            ticket = await waiter.slot
        except asyncio.CancelledError:
            given = waiter.slot.result() if not waiter.slot.cancelled() else None
            if given is not None:
                self.leave(given)
            self._forget(waiter)
            raise
        finally:
            timer.cancel()
        if ticket is None:
            raise self._refusal()
        return ticket

    def _expire(self, waiter: _Waiter) -> None:
        # Somebody may have become a lingerer meanwhile; nobody says when.
        self._hand_on(self._clock())
        if not waiter.slot.done():
            self._forget(waiter)
            waiter.slot.set_result(None)

    def _hand_on(self, now: float) -> None:
        while self._waiters and self._has_room(now):
            waiter = self._waiters.popleft()
            if not waiter.slot.done():
                waiter.slot.set_result(self._take(waiter.address, now))
        if not self._waiters:
            self._queued_since = None

    def _forget(self, waiter: _Waiter) -> None:
        if waiter in self._waiters:
            self._waiters.remove(waiter)
        if not self._waiters:
            self._queued_since = None

    def _expected_wait(self) -> float:
        return self._seconds * (len(self._waiters) + 1) / self._slots.running

    def _longest_wait(self, now: float) -> float:
        stands = self._queued_since is not None and now - self._queued_since > self._slots.burst_seconds
        return self._slots.overload_wait_seconds if stands else self._slots.wait_seconds

    def _refusal(self, limit: str = "") -> ResourceExhausted:
        retry_seconds = random.uniform(*_RETRY_SECONDS)
        return ResourceExhausted(
            f"the service has more calls than it can answer in time: {limit or self.running} {self.pool} are in "
            f"progress; call again in {retry_seconds:.1f} s",
            reason=Reason.OVERLOADED,
            metadata={"pool": self.pool},
            retry_after_seconds=retry_seconds,
        )


class Admission:
    """The gates of a server, and the stage that every call passes them in. It comes after the credentials."""

    def __init__(self, limits: Limits, metrics: AdmissionMetrics) -> None:
        self._metrics = metrics
        slots: dict[Pool, Slots] = {
            "probes": limits.probes,
            "probe_streams": limits.probe_streams,
            "workers": limits.workers,
            "reads": limits.reads,
            "writes": limits.writes,
            "streams": limits.streams,
        }
        self._gates = {pool: Gate(pool, one) for pool, one in slots.items()}
        for pool, gate in self._gates.items():
            metrics.follow(pool, gate)

    @asynccontextmanager
    async def stage(self, call: Call) -> AsyncIterator[None]:
        """Hold a slot while the call is in progress. Raises ResourceExhausted OVERLOADED."""
        principal = current_principal()
        gate = self._gates[_pool_of(call, None if principal is None else principal.kind)]
        try:
            ticket = await gate.enter(_address_of(call))
        except ResourceExhausted:
            call.is_shed = True
            self._metrics.refused.labels(gate.pool).inc()
            raise
        try:
            yield
        finally:
            gate.leave(ticket)


def _pool_of(call: Call, kind: Kind | None) -> Pool:
    streams = call.type != "unary"
    if kind is None:
        return "probe_streams" if streams else "probes"
    if kind != "key":
        return "workers"
    if streams:
        return "streams"
    return "writes" if _is_mutation(call.method) else "reads"


@cache
def _is_mutation(method: str) -> bool:
    """Tell whether a method changes something: its request then has a `request_id` (AIP-155)."""
    service, _, name = method.strip("/").partition("/")
    try:
        described = descriptor_pool.Default().FindMethodByName(f"{service}.{name}")
    except KeyError:
        return False
    return "request_id" in described.input_type.fields_by_name


def _address_of(call: Call) -> str:
    """Return where the call comes from, without the port: `ipv4:127.0.0.1`."""
    return (call.context.peer() or "").rpartition(":")[0]
