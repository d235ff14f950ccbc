"""Prometheus metrics of a service's calls, under the names of go-grpc-middleware where it has names."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import grpc
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import Metric as Family
from prometheus_client.registry import Collector

from luthier.errors import Reason
from luthier.runtime.calls import Call, CallType
from luthier.runtime.catalogue import calls
from luthier.runtime.metric import reason_label

CODES = {
    code: "".join(word.capitalize() for word in code.name.split("_")) if code.name != "OK" else "OK"
    for code in grpc.StatusCode
} | {grpc.StatusCode.CANCELLED: "Canceled"}
"""Go's spelling of the codes: INVALID_ARGUMENT is InvalidArgument, CANCELLED has one l."""


Exemplar = dict[str, str]


@dataclass(slots=True, kw_only=True, eq=False)
class _Method:
    """The series of one method, found once and not for each call.

    `shed` calls were refused as they came; the counters have `told_shed` of them.
    """

    labels: tuple[str, str, str]
    started: Counter
    received: Counter
    sent: Counter
    seconds: Histogram
    received_bytes: Histogram
    sent_bytes: Histogram
    handled: dict[grpc.StatusCode, Counter] = field(default_factory=dict)
    in_flight: int = 0
    shed: int = 0
    told_shed: int = 0


class CallMetrics(Collector):
    """Counts and times calls. For one event loop; it is read from any thread."""

    def __init__(self, registry: CollectorRegistry) -> None:
        # Before its counters: it is read first, and brings them up to date.
        registry.register(self)
        self._telling = threading.Lock()
        self._started = calls.STARTED.counter(registry)
        self._handled = calls.HANDLED.counter(registry)
        self._failed = calls.FAILED.counter(registry)
        self._received = calls.RECEIVED.counter(registry)
        self._sent = calls.SENT.counter(registry)
        self._seconds = calls.SECONDS.histogram(registry)
        self._stream_seconds = calls.STREAM_SECONDS.histogram(registry)
        self._received_bytes = calls.RECEIVED_BYTES.histogram(registry)
        self._sent_bytes = calls.SENT_BYTES.histogram(registry)
        self._methods: dict[str, _Method] = {}

    def describe(self) -> Iterator[Family]:
        """Yield what `collect` does, without series."""
        yield calls.IN_FLIGHT.family()

    def collect(self) -> Iterator[Family]:
        """Yield the calls in progress by method; count what was shed since somebody looked last."""
        with self._telling:
            for method in list(self._methods.values()):
                self._tell_shed(method)
        family = calls.IN_FLIGHT.family()
        for method in list(self._methods.values()):
            family.add_metric(method.labels, method.in_flight)
        yield family

    def prepare(self, method: str, call_type: CallType) -> None:
        """Create a method's series at zero, so that rates are right from the first call."""
        self._count_handled(self._method(method, call_type), grpc.StatusCode.OK, 0)

    def started(self, call: Call) -> None:
        """Count a call that begins, and have the sizes of its messages measured."""
        method = self._method(call.method, call.type)
        method.started.inc()
        method.in_flight += 1
        call.measure_received = method.received_bytes.observe
        call.measure_sent = method.sent_bytes.observe

    def shed(self, method: str, call_type: CallType) -> None:
        """Count a call that was refused as it came.

        In a flood there is no time for five counters a call: they are told when they are read. It is not timed: what is
        refused in no time would make the answers of others look quick.
        """
        self._method(method, call_type).shed += 1

    def _tell_shed(self, method: _Method) -> None:
        number = method.shed - method.told_shed
        if number:
            method.told_shed += number
            method.started.inc(number)
            self._count_handled(method, grpc.StatusCode.RESOURCE_EXHAUSTED, number)
            self._count_failed(method, grpc.StatusCode.RESOURCE_EXHAUSTED, Reason.OVERLOADED, number=number)

    def handled(self, call: Call, seconds: float) -> None:
        """Count a call that ended after `seconds`."""
        method = self._method(call.method, call.type)
        method.in_flight -= 1
        self._count_handled(method, call.code)
        if call.code is not grpc.StatusCode.OK:
            self._count_failed(method, call.code, call.reason, _exemplar(call))
        method.received.inc(call.received)
        method.sent.inc(call.sent)
        method.seconds.observe(seconds, _exemplar(call))

    def _count_handled(self, method: _Method, code: grpc.StatusCode, number: int = 1) -> None:
        counter = method.handled.get(code)
        if counter is None:
            counter = method.handled[code] = self._handled.labels(*method.labels, CODES[code])
        counter.inc(number)

    def _count_failed(
        self,
        method: _Method,
        code: grpc.StatusCode,
        reason: str,
        exemplar: Exemplar | None = None,
        number: int = 1,
    ) -> None:
        counter = self._failed.labels(method.labels[1], CODES[code], reason_label(reason))
        counter.inc(number, exemplar=exemplar)

    def _method(self, name: str, call_type: CallType) -> _Method:
        found = self._methods.get(name)
        if found is None:
            found = self._methods[name] = self._made(name, call_type)
        return found

    def _made(self, name: str, call_type: CallType) -> _Method:
        _, service, method = name.split("/")
        labels = (call_type, service, method)
        timed = self._seconds if call_type == "unary" else self._stream_seconds
        return _Method(
            labels=labels,
            started=self._started.labels(*labels),
            received=self._received.labels(*labels),
            sent=self._sent.labels(*labels),
            seconds=timed.labels(*labels),
            received_bytes=self._received_bytes.labels(service, call_type),
            sent_bytes=self._sent_bytes.labels(service, call_type),
        )


def _exemplar(call: Call) -> Exemplar | None:
    """Return what leads from a series to a trace of a call that it counts; scrapers that take OpenMetrics see it."""
    return {"trace_id": call.trace_id} if call.trace_id else None
