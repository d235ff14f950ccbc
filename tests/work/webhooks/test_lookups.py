"""Lookups that never end hold up nobody, and not the end of the process either."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from luthier.work.webhooks.lookups import Lookups


class Resolver:
    """Knows every name but those of `.dead`, which it thinks about until it is released."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.released = threading.Event()

    def getaddrinfo(self, host: str, port: int | None, **_: Any) -> list[Any]:
        self.asked.append(host)
        if host.endswith(".dead"):
            self.released.wait(30)
        if host.endswith(".gone"):
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("93.184.216.34", port))]


@pytest.fixture
def resolver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Resolver]:
    resolver = Resolver()
    monkeypatch.setattr(socket, "getaddrinfo", resolver.getaddrinfo)
    yield resolver
    resolver.released.set()


async def test_names_that_never_answer_hold_up_nobody(resolver: Resolver) -> None:
    lookups = Lookups()
    dead = [asyncio.create_task(lookups.addresses(f"a{number}.dead")) for number in range(40)]
    async with asyncio.timeout(5):
        assert await lookups.addresses("a.well") == ["93.184.216.34"]
    assert not any(one.done() for one in dead)
    resolver.released.set()
    async with asyncio.timeout(5):
        await asyncio.gather(*dead)


async def test_a_name_is_looked_up_once_at_a_time(resolver: Resolver) -> None:
    lookups = Lookups()
    for _ in range(10):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await lookups.addresses("a.dead")
    assert resolver.asked == ["a.dead"], "who gave up left no more than one thread behind"
    resolver.released.set()
    async with asyncio.timeout(5):
        assert await lookups.addresses("a.dead") == ["93.184.216.34"]
        assert await lookups.addresses("a.well") == await lookups.addresses("a.well")
    assert resolver.asked.count("a.well") == 2, "what a name led to is not kept"


async def test_whoever_asks_is_told_that_a_name_is_not_known(resolver: Resolver) -> None:
    lookups = Lookups()
    for _ in range(2):
        with pytest.raises(OSError, match="not known"):
            await lookups.addresses("a.gone")


def test_the_end_of_the_process_waits_for_no_lookup() -> None:
    program = """
import asyncio, socket, time
from luthier.work.webhooks.lookups import Lookups

socket.getaddrinfo = lambda *_, **__: time.sleep(120)

async def main():
    try:
        async with asyncio.timeout(0.1):
            await Lookups().addresses("a.dead")
    except TimeoutError:
        print("slow")

asyncio.run(main())
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, "slow\n"), done.stderr
