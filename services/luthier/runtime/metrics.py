"""The metrics of a process, on a port of their own: of its calls, of its event loop, of itself."""

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

from prometheus_client import CollectorRegistry, ProcessCollector, disable_created_metrics, start_http_server

from luthier.errors import FailedPrecondition, InvalidArgument
from luthier.runtime.addresses import is_loopback
from luthier.runtime.call_metrics import CallMetrics
from luthier.runtime.catalogue import process

_LAG_SECONDS = 0.25
_logger = logging.getLogger(__name__)


class MetricsServer:
    """The registry of a process, served on /metrics while `serving` lasts.

    A thread forms each page, so that the event loop goes on meanwhile: what is read there, is read from that thread.
    """

    def __init__(self, address: str) -> None:
        """Take host:port, port 0 for a free one; without a host every address. Raises InvalidArgument."""
        # A second series for each of a counter and a histogram, which nobody reads: restarts show by their resets.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._host, _, port = address.rpartition(":")
        if not port.isdecimal() or int(port) > 65535:
            raise InvalidArgument(
                f"an address of metrics must be host:port, e.g. 127.0.0.1:9601, got {address!r}"
            )
        self._port = int(port)
        self.registry = CollectorRegistry()
        self.calls = CallMetrics(self.registry)
        process.BUILD.gauge(self.registry).labels(version("luthier")).set(1)
        self._lag = process.LAG.histogram(self.registry)
        ProcessCollector(registry=self.registry)

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
            self._lag.observe(max(0.0, time.monotonic() - due))


async def _shut_down(server: WSGIServer) -> None:
    """End serving at once: the server looks every half second whether it shall, and whenever somebody connects."""
    ended = asyncio.get_running_loop().run_in_executor(None, server.shutdown)
    while not ended.done():
        await asyncio.to_thread(_knock, server.server_address[:2])
        await asyncio.wait({ended}, timeout=0.05)


def _knock(address: Any) -> None:
    with suppress(OSError):
        socket.create_connection(address, timeout=1).close()
