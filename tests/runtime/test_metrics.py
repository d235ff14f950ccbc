"""The port for metrics: it ends with its service at once, and says how late the event loop is."""

from __future__ import annotations

import asyncio
import threading
import time
import urllib.request
from collections.abc import Iterator

from prometheus_client.core import Metric as Family
from prometheus_client.registry import Collector

from luthier.runtime.catalogue import process
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


async def test_an_event_loop_that_is_kept_from_its_work_shows_a_lag() -> None:
    server = MetricsServer("127.0.0.1:0")

    def lag(part: str) -> float:
        return server.registry.get_sample_value(f"{process.LAG.name}_{part}") or 0.0

    began = time.monotonic()
    async with server.serving():
        await asyncio.sleep(0.05)
        before = lag("sum")
        time.sleep(0.6)  # noqa: ASYNC251 - it is what the lag tells of
        async with asyncio.timeout(10):
            while not lag("count"):  # noqa: ASYNC110 - a timer brings it about
                await asyncio.sleep(0.01)
        assert lag("sum") - before >= 0.3, "the timer was due a quarter of a second after it was set"
        # Each time took its quarter of a second, which is no lag, and what it was late.
        assert lag("sum") <= time.monotonic() - began - 0.25 * lag("count")
