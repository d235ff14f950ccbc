"""The port for metrics ends with its service, not half a second later."""

from __future__ import annotations

import asyncio
import threading
import time
import urllib.request
from collections.abc import Iterator

from prometheus_client.core import Metric as Family
from prometheus_client.registry import Collector

from luthier.runtime.metrics import MetricsServer


def page(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        return str(answer.read())


async def stop_seconds(address: str) -> float:
    async with MetricsServer(address).serving():
        began = time.monotonic()
    return time.monotonic() - began


async def test_serving_ends_at_once() -> None:
    for address in ("127.0.0.1:0", "0.0.0.0:0"):
        # The quickest of some: the machine may be busy.
        assert min([await stop_seconds(address) for _ in range(5)]) < 0.3


async def test_what_was_served_is_gone_when_serving_ends() -> None:
    async with MetricsServer("127.0.0.1:0").serving() as port:
        pass
    async with MetricsServer(f"127.0.0.1:{port}").serving() as again:
        assert again == port
        assert "luthier_build_info" in await asyncio.to_thread(page, port)


class Slow(Collector):
    """Takes its time over a page: until somebody says that it may end."""

    def __init__(self) -> None:
        self.began, self.may_end = threading.Event(), threading.Event()
        self.waited_well = False

    def collect(self) -> Iterator[Family]:
        self.began.set()
        self.waited_well = self.may_end.wait(20)
        yield from ()

    def describe(self) -> Iterator[Family]:
        yield from ()


async def test_a_page_is_formed_while_the_event_loop_goes_on() -> None:
    server, slow = MetricsServer("127.0.0.1:0"), Slow()
    server.registry.register(slow)
    async with server.serving() as port:
        asked = asyncio.create_task(asyncio.to_thread(page, port))
        assert await asyncio.to_thread(slow.began.wait, 20)
        assert not asked.done()
        # On the loop the page would have waited in vain for what only the loop says.
        slow.may_end.set()
        assert "luthier_build_info" in await asked
    assert slow.waited_well
