"""The port for metrics ends with its service, not half a second later."""

from __future__ import annotations

import asyncio
import time
import urllib.request

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
