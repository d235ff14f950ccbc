"""Who waits for whom: ports of one host, dead names, projects at one receiver, and many deliveries."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.engine import Engine
from tests.work.webhooks.conftest import A_RECEIVER, QUICK, Bench, tell
from tests.work.webhooks.receiver import receiving

from luthier.v1.webhook_pb2 import WebhookDelivery
from luthier.work.webhooks import outbox

State = WebhookDelivery.State
LIMITS = outbox.DueLimits(of_host=4, all=64)


@pytest.fixture
def dead_ports() -> Iterator[list[int]]:
    """Forty ports of 127.0.0.2 that take connections and say nothing."""
    with ExitStack() as stack:
        ports = []
        for _ in range(40):
            listening = stack.enter_context(socket.socket())
            listening.bind(("127.0.0.2", 0))
            listening.listen(8)
            ports.append(listening.getsockname()[1])
        yield ports


@pytest.fixture
def dead_zone(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A zone whose names are looked up for ever."""
    real, released = socket.getaddrinfo, threading.Event()

    def found(host: str, *arguments: Any, **named: Any) -> Any:
        if host.endswith(".dead"):
            released.wait(60)
            raise socket.gaierror(socket.EAI_AGAIN, "no answer")
        return real(host, *arguments, **named)

    monkeypatch.setattr(socket, "getaddrinfo", found)
    yield "dead"
    released.set()


async def test_dead_ports_of_one_host_and_a_dead_zone_stop_nobody(
    bench: Bench, tmp_path: Path, dead_ports: list[int], dead_zone: str
) -> None:
    names = [f"a{number}.{dead_zone}" for number in range(12)]
    for number in range(2):
        for port in dead_ports:
            await bench.end(f"http://127.0.0.2:{port}/", uid=f"port{port}-{number}")
        for name in names:
            await bench.end(f"https://{name}/", uid=f"{name}-{number}")
    with receiving(tmp_path) as well:
        await bench.end(f"{well.origin}/ok", uid="well")
        config = replace(QUICK, addresses=("127.0.0.1", "127.0.0.2", *names), timeout_seconds=20.0)
        async with bench.sending(config):
            began = time.monotonic()
            await bench.until(State.STATE_DELIVERED, uid="well")
            assert time.monotonic() - began < 15.0, "it waited for an attempt at another one"


async def test_a_host_takes_the_places_of_no_other(bench: Bench) -> None:
    for port in range(1, 200):
        await bench.end(f"https://many.example:{port}/", uid=f"u{port}")
    await bench.end("https://a.example/", uid="last")
    async with bench.database.reading() as connection:
        found = [one for one, _ in await outbox.due_receivers(connection, (), (), LIMITS)]
        less = await outbox.due_receivers(connection, ["many.example"], (), LIMITS)
        others = await outbox.due_receivers(connection, (), [A_RECEIVER.origin], LIMITS)
    assert sorted(one.host for one in found) == ["a.example", *["many.example"] * 4]
    assert less == [(A_RECEIVER, 1)]
    assert {one.host for one, _ in others} == {"many.example"}


async def test_each_project_has_its_turn_at_a_receiver(bench: Bench) -> None:
    for number in range(3):
        for project in "abc":
            await tell(bench, "https://a.example/", project, f"{project}{number}")
    order: list[str] = []
    sent: list[str] = []
    last = ""
    async with bench.database.reading() as connection:
        while (found := await outbox.next_due(connection, A_RECEIVER, sent, last)) is not None:
            sent.append(found.delivery_id)
            last = found.project
            order.append(last)
    assert "".join(order) == "abc" * 3


async def test_a_project_that_floods_a_receiver_does_not_hold_up_another(
    bench: Bench, tmp_path: Path
) -> None:
    """Its deliveries fail, too: a lane ends with each."""
    with receiving(tmp_path) as receiver:
        for number in range(60):
            await tell(bench, f"{receiver.origin}/fail", "flood", f"flood{number}")
        await tell(bench, f"{receiver.origin}/ok", "other", "other")
        async with bench.sending(replace(QUICK, first_delay_seconds=30.0)):
            await bench.until(State.STATE_DELIVERED, uid="other")
        before = [one["path"] for one in receiver.received()].index("/ok")
    assert before <= 4, f"it waited for {before} of another project"


@contextmanager
def statements() -> Iterator[list[tuple[str, Any]]]:
    """What is asked of deliveries in the block, with its values."""
    asked: list[tuple[str, Any]] = []

    def note(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if "deliveries" in statement:
            asked.append((statement, parameters))

    event.listen(Engine, "before_cursor_execute", note)
    try:
        yield asked
    finally:
        event.remove(Engine, "before_cursor_execute", note)


@pytest.fixture
async def asked(bench: Bench) -> list[tuple[str, Any]]:
    """What a sender asks of an outbox with something in it."""
    await bench.end("https://a.example/")
    with statements() as found:
        async with bench.database.transaction() as connection:
            await outbox.waiting(connection)
            await outbox.due_receivers(connection, ["b.example"], ["https://b.example:443"], LIMITS)
            due = await outbox.next_due(connection, A_RECEIVER, ["msg_1", "msg_2"], "o")
            assert due is not None
            await outbox.next_due(connection, A_RECEIVER, [due.delivery_id], "")
            await outbox.settle(connection, due, State.STATE_DELIVERED)
            await outbox.forget_ended(connection, 60.0, 10)
    return found


async def test_nothing_reads_the_whole_outbox(bench: Bench, asked: list[tuple[str, Any]]) -> None:
    """Else a delivery would take longer the more there are: those that are over stay for a month."""
    async with bench.database.reading() as connection:
        plans = [
            [row.detail for row in await connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {one}", values)]
            for one, values in asked
        ]
    reads = [[line for line in plan if "deliveries" in line] for plan in plans]
    at_receiver = (
        "SEARCH deliveries USING INDEX ix_deliveries_due (state=? AND host=? AND origin=? AND project"
    )
    by_id = "SEARCH deliveries USING INDEX sqlite_autoindex_deliveries_1 (delivery_id=?)"
    assert reads == [
        ["SEARCH deliveries USING COVERING INDEX ix_deliveries_created (state=?)"],
        # Once a sweep: of what waits the index alone is read.
        ["SEARCH deliveries USING COVERING INDEX ix_deliveries_due (state=?)"],
        [f"{at_receiver}>?)"],
        [f"{at_receiver}>?)"],
        [f"{at_receiver}<?)"],
        [by_id],
        [by_id, "SEARCH deliveries USING INDEX ix_deliveries_ended (state=? AND ended_at_us<?)"],
    ]
    assert not any("TEMP B-TREE" in line for plan in plans[2:] for line in plan), (
        "what is next is not sorted for"
    )
