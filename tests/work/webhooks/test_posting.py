"""Receivers with several addresses, some of them dead; on real sockets of loopback."""

from __future__ import annotations

import asyncio
import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from tests.work.webhooks.receiver import Receiver, receiving

from luthier.work.webhooks.posting import Answer, post
from luthier.work.webhooks.targets import target_of


@pytest.fixture
def receiver(tmp_path: Path) -> Iterator[Receiver]:
    with receiving(tmp_path) as receiver:
        yield receiver


@pytest.fixture
def deaf(receiver: Receiver) -> Iterator[list[str]]:
    """Addresses whose port takes no connection, as one behind a firewall: their queues are full."""
    addresses = ["127.0.0.7", "127.0.0.8", "127.0.0.9"]
    with ExitStack() as stack:
        for address in addresses:
            listening = stack.enter_context(socket.socket())
            listening.bind((address, receiver.port))
            listening.listen(0)
            for _ in range(4):
                waits = stack.enter_context(socket.socket())
                waits.setblocking(False)
                waits.connect_ex((address, receiver.port))
        yield addresses


async def posted(addresses: list[str], receiver: Receiver, seconds: float) -> Answer:
    deadline = asyncio.get_running_loop().time() + seconds
    async with asyncio.timeout_at(deadline):
        return await post(
            addresses,
            target_of(f"{receiver.origin}/ok"),
            {"webhook-id": "msg_1"},
            b"{}",
            trusted=ssl.create_default_context(),
            deadline=deadline,
        )


async def test_dead_addresses_leave_time_for_the_one_that_is_well(
    receiver: Receiver, deaf: list[str]
) -> None:
    began = time.monotonic()
    answer = await posted([*deaf, "127.0.0.1"], receiver, 6.0)
    assert answer.status == 204
    assert time.monotonic() - began > 4.0, "the dead ones were given their shares"


async def test_addresses_that_refuse_take_no_time(receiver: Receiver) -> None:
    began = time.monotonic()
    assert (await posted(["127.0.0.3", "127.0.0.4", "127.0.0.1"], receiver, 30.0)).status == 204
    assert time.monotonic() - began < 5.0


async def test_dead_addresses_alone_take_no_more_than_the_time_for_all(
    receiver: Receiver, deaf: list[str]
) -> None:
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        await posted(deaf, receiver, 1.5)
    assert time.monotonic() - began < 4.0
    with pytest.raises(OSError, match="Connect call failed"):
        await posted([deaf[0], "127.0.0.3"], receiver, 3.0)
