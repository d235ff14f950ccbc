"""Prometheus metrics of a service's calls, under the names of go-grpc-middleware, on a port of their own."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from importlib.metadata import version
from typing import Any
from wsgiref.simple_server import WSGIServer

import grpc
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from luthier.errors import FailedPrecondition
from luthier.runtime.addresses import is_loopback
from luthier.runtime.calls import Call

_LAG_SECONDS = 1.0
_logger = logging.getLogger(__name__)
_LABELS = ("grpc_type", "grpc_service", "grpc_method")
_CODES = {
    code: "".join(word.capitalize() for word in code.name.split("_")) if code.name != "OK" else "OK"
    for code in grpc.StatusCode
} | {grpc.StatusCode.CANCELLED: "Canceled"}
"""Go's spelling of the codes: INVALID_ARGUMENT is InvalidArgument, CANCELLED has one l."""


class ServerMetrics:
    """Counts and times calls."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._started = Counter("grpc_server_started", "Calls begun.", _LABELS, registry=registry)
        self._handled = Counter(
            "grpc_server_handled", "Calls ended.", (*_LABELS, "grpc_code"), registry=registry
        )
        self._received = Counter("grpc_server_msg_received", "Messages received.", _LABELS, registry=registry)
        self._sent = Counter("grpc_server_msg_sent", "Messages sent.", _LABELS, registry=registry)
        self._seconds = Histogram(
            "grpc_server_handling_seconds",
            "Time from a call's beginning to its end.",
            _LABELS,
            registry=registry,
        )

    def prepare(self, method: str, call_type: str) -> None:
        """Create a method's series at zero, so that rates are right from the first call."""
        labels = _labels(method, call_type)
        for metric in (self._started, self._received, self._sent, self._seconds):
            metric.labels(*labels)
        self._handled.labels(*labels, "OK")

    def started(self, call: Call) -> None:
        """Count a call that begins."""
        self._started.labels(*_labels(call.method, call.type)).inc()

    def shed(self, method: str, call_type: str) -> None:
        """Count a call that was refused as it came."""
        labels = _labels(method, call_type)
        self._started.labels(*labels).inc()
        self._handled.labels(*labels, _CODES[grpc.StatusCode.RESOURCE_EXHAUSTED]).inc()
        self._seconds.labels(*labels).observe(0.0)

    def handled(self, call: Call, seconds: float) -> None:
        """Count a call that ended after `seconds`."""
        labels = _labels(call.method, call.type)
        self._handled.labels(*labels, _CODES[call.code]).inc()
        self._received.labels(*labels).inc(call.received)
        self._sent.labels(*labels).inc(call.sent)
        self._seconds.labels(*labels).observe(seconds)


class MetricsServer:
    """The registry of a process, served on /metrics while `serving` lasts."""

    def __init__(self, address: str) -> None:
        self._host, _, port = address.rpartition(":")
        self._port = int(port)
        self.registry = CollectorRegistry()
        self.calls = ServerMetrics(self.registry)
        Gauge("luthier_build_info", "Version of the code.", ["version"], registry=self.registry).labels(
            version("luthier")
        ).set(1)
        self._lag = Gauge(
            "luthier_event_loop_lag_seconds",
            "How much later than due the event loop last ran a timer.",
            registry=self.registry,
        )

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[int]:
        """Serve /metrics; yields the port."""
        try:
            server, thread = start_http_server(self._port, addr=self._host, registry=self.registry)
        except OSError as error:
            raise FailedPrecondition(
                f"cannot serve metrics on {self._host}:{self._port} ({error.strerror}): is the port taken?"
            ) from error
        if not is_loopback(self._host):
            _logger.warning(
                "metrics are served without a key to everybody who reaches %s:%d; bind them to loopback, or keep "
                "others away with a firewall",
                self._host or "every address of this machine,",
                server.server_port,
            )
        lag = asyncio.create_task(self._measure_lag())
        try:
            yield server.server_port
        finally:
            lag.cancel()
            with suppress(asyncio.CancelledError):
                await lag
            await _shut_down(server)
            server.server_close()
            thread.join()

    async def _measure_lag(self) -> None:
        while True:
            due = time.monotonic() + _LAG_SECONDS
            await asyncio.sleep(_LAG_SECONDS)
            self._lag.set(max(0.0, time.monotonic() - due))


async def _shut_down(server: WSGIServer) -> None:
    """End serving at once: the server looks every half second whether it shall, and whenever somebody connects."""
    ended = asyncio.get_running_loop().run_in_executor(None, server.shutdown)
    while not ended.done():
        await asyncio.to_thread(_knock, server.server_address[:2])
        await asyncio.wait({ended}, timeout=0.05)


def _knock(address: Any) -> None:
    with suppress(OSError):
        socket.create_connection(address, timeout=1).close()


def _labels(method: str, call_type: str) -> tuple[str, str, str]:
    _, service, name = method.split("/")
    return call_type, service, name
