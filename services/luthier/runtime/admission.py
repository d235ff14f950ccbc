"""Who is let in when many come: slots by kind of caller, waits that are short, refusals that are quick.

gRPC's own limit of concurrent calls cannot tell callers apart, and answers without a reason. Here each kind of
caller has slots that no other kind can take, so that health checks and workers go on while users wait, and callers
without a key cannot stand in the way of those with one.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import cache
from time import monotonic
from typing import Literal

from google.protobuf import descriptor_pool
from prometheus_client import CollectorRegistry
from prometheus_client import Counter as Series

from luthier.errors import Reason, ResourceExhausted
from luthier.runtime.auth import Kind, current_principal
from luthier.runtime.calls import Call, CallType
from luthier.runtime.catalogue import calls
from luthier.runtime.intake import Intake
from luthier.runtime.metric import reason_label

Pool = Literal["probes", "probe_streams", "workers", "reads", "writes", "streams"]

HEALTH_SERVICE = "/grpc.health.v1.Health/"

# Spread, so that those who were refused together do not come back together.
_RETRY_SECONDS = (0.2, 1.0)
_FIRST_GUESS_SECONDS = 0.005
_SMOOTHING = 0.1
_OVERLOAD_SECONDS = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Slots:
    """How many calls of a kind run, and how long others wait for them.

    Attributes:
        running: calls at once.
        wait_seconds: longest wait for a slot in a burst, and the longest expected one that is begun; 0: none waits.
        overload_wait_seconds: the same in overload, which is when somebody was refused a moment ago.
        patience_seconds: a call that has run this long waits for something else than this process, and no longer
            counts as running but as `lingering`; 0: never.
        lingering: such calls at once, besides those that run.
        per_address: calls at once from one address; 0: no limit.
    """

    running: int
    wait_seconds: float = 0.0
    overload_wait_seconds: float = 0.0
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

    probes: Slots = Slots(running=64, patience_seconds=0.5, lingering=1024)
    probe_streams: Slots = Slots(running=64, per_address=32)
    workers: Slots = Slots(running=1024)
    reads: Slots = Slots(
        running=2,
        wait_seconds=0.15,
        overload_wait_seconds=0.015,
        patience_seconds=0.15,
        lingering=128,
    )
    writes: Slots = Slots(
        running=2,
        wait_seconds=0.15,
        overload_wait_seconds=0.03,
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
    """Counts who was refused because something was used up, and shows who is in."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._refused = calls.REFUSED.counter(registry)
        self._overloaded: dict[str, Series] = {}
        self.running = calls.RUNNING.gauge(registry)
        self.waiting = calls.WAITING.gauge(registry)
        self.intake = calls.INTAKE.gauge(registry)

    def refused(self, pool: str, reason: str) -> None:
        """Count a refusal at the door of a pool, or by whoever answers a call that came in (no pool)."""
        self._refused.labels(pool, reason_label(reason)).inc()

    def overloaded(self, pool: Pool) -> None:
        """Count a refusal at the door of a pool, of which many come."""
        self._overloaded[pool].inc()

    def follow(self, pool: Pool, gate: Gate) -> None:
        """Create a pool's series, and show its gate whenever somebody looks."""
        self._overloaded[pool] = self._refused.labels(pool, str(Reason.OVERLOADED))
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
    since: float
    slot: asyncio.Future[_Ticket | None]
    timer: asyncio.TimerHandle = field(init=False)


class Gate:
    """The slots of one kind of caller. Use from one event loop."""

    def __init__(
        self,
        pool: Pool,
        slots: Slots,
        intake: Intake | None = None,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self.pool = pool
        self._slots = slots
        self._intake = intake
        self._clock = clock
        # In order of beginning: the first has run longest.
        self._running: dict[_Ticket, None] = {}
        self._lingering = 0
        self._waiters: deque[_Waiter] = deque()
        self._by_address: Counter[str] = Counter()
        self._seconds = _FIRST_GUESS_SECONDS
        self._refused_at = -math.inf

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
        if self._slots.per_address and self._by_address[address] >= self._slots.per_address:
            raise self._refusal(f"at most {self._slots.per_address} come from one address")
        if self.is_crowded():
            raise self._refusal()
        now = self._clock()
        if not self._waiters and self._has_room(now):
            return self._take(address, now)
        return await self._wait(address, now)

    def is_crowded(self) -> bool:
        """Tell whether who comes now is refused: no slot is free, nor will one be in time."""
        now = self._clock()
        # Whoever runs takes turns of the loop from those that wait outside, unseen: in a flood nobody else begins.
        if self._slots.overload_wait_seconds and self._intake is not None and self._intake.is_flooded(now):
            return self._crowd(now)
        if not self._waiters and self._has_room(now):
            return False
        return self._expected_wait() > self._longest_wait(now) and self._crowd(now)

    def _crowd(self, now: float) -> Literal[True]:
        self._refused_at = now
        if self._intake is not None:
            self._intake.crowded(now)
        return True

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
        waiter = _Waiter(address, now, loop.create_future())
        self._waiters.append(waiter)
        waiter.timer = loop.call_later(self._slots.overload_wait_seconds, self._expire, waiter)
        try:
            ticket = await waiter.slot
        except asyncio.CancelledError:
            given = waiter.slot.result() if not waiter.slot.cancelled() else None
            if given is not None:
                self.leave(given)
            self._forget(waiter)
            raise
        finally:
            waiter.timer.cancel()
        if ticket is None:
            raise self._refusal()
        return ticket

    def _expire(self, waiter: _Waiter) -> None:
        # Somebody may have become a lingerer meanwhile; nobody says when.
        now = self._clock()
        self._hand_on(now)
        if waiter.slot.done():
            return
        left = waiter.since + self._longest_wait(now) - now
        if left > 0:
            waiter.timer = asyncio.get_running_loop().call_later(left, self._expire, waiter)
        else:
            self._forget(waiter)
            self._refused_at = now
            waiter.slot.set_result(None)

    def _hand_on(self, now: float) -> None:
        while self._waiters and self._has_room(now):
            waiter = self._waiters.popleft()
            if not waiter.slot.done():
                waiter.slot.set_result(self._take(waiter.address, now))

    def _forget(self, waiter: _Waiter) -> None:
        if waiter in self._waiters:
            self._waiters.remove(waiter)

    def _expected_wait(self) -> float:
        return self._seconds * (len(self._waiters) + 1) / self._slots.running

    def _longest_wait(self, now: float) -> float:
        is_overload = now - self._refused_at < _OVERLOAD_SECONDS
        return self._slots.overload_wait_seconds if is_overload else self._slots.wait_seconds

    def _refusal(self, more: str = "") -> ResourceExhausted:
        return overloaded(self.pool, random.uniform(*_RETRY_SECONDS), more)


def overloaded(pool: Pool, retry_seconds: float, more: str = "") -> ResourceExhausted:
    """Return what is told to those for whom no slot is free."""
    return ResourceExhausted(
        f"no slot is free for another of the calls that are counted as {pool}{more and f': {more}'}; "
        f"call again in {retry_seconds:.1f} s",
        reason=Reason.OVERLOADED,
        metadata={"pool": pool},
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
        self.intake = Intake()
        metrics.intake.set_function(lambda: self.intake.wait_seconds(monotonic()))
        self._gates = {pool: Gate(pool, one, self.intake) for pool, one in slots.items()}
        for pool, gate in self._gates.items():
            metrics.follow(pool, gate)

    def gate(self, call_type: CallType, method: str, kind: Kind | None) -> Gate:
        """Return the gate that a call passes; `kind` is of whom calls, None without a key."""
        return self._gates[_pool_of(call_type, method, kind)]

    def arrived(self) -> None:
        """Count a unary call with a key that came: for those of others nobody is refused."""
        self.intake.arrived()

    def refused(self, gate: Gate) -> None:
        """Count a refusal that no stage of a call sees."""
        self._metrics.overloaded(gate.pool)

    @asynccontextmanager
    async def stage(self, call: Call) -> AsyncIterator[None]:
        """Hold a slot while the call is in progress. Raises ResourceExhausted OVERLOADED."""
        principal = current_principal()
        gate = self.gate(call.type, call.method, None if principal is None else principal.kind)
        try:
            ticket = await gate.enter(_address_of(call))
        except ResourceExhausted:
            call.shed_by = gate.pool
            raise
        try:
            yield
        finally:
            gate.leave(ticket)


def _pool_of(call_type: CallType, method: str, kind: Kind | None) -> Pool:
    streams = call_type != "unary"
    if kind is None:
        return "probe_streams" if streams else "probes"
    if kind != "key":
        return "workers"
    if streams:
        return "streams"
    return "writes" if _is_mutation(method) else "reads"


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
