"""How long calls wait inside gRPC is measured by the server's own, and nobody begins while they wait long."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from grpc import aio
from tests.runtime.conftest import Site
from tests.runtime.test_admission import HOME, Clock
from tests.runtime.test_server import metrics_of

from luthier.errors import ResourceExhausted
from luthier.runtime import intake as module
from luthier.runtime.admission import Gate, Slots
from luthier.runtime.intake import Intake


def wait(intake: Intake, clock: Clock, seconds: float, ahead: int = 20) -> None:
    """Let the server's own call wait so long, behind so many others."""
    send(intake, clock, ahead)
    clock.now += seconds
    intake.service(called(intake.method))


def send(intake: Intake, clock: Clock, ahead: int = 20) -> None:
    intake._sent_at, intake._ahead = clock.now, 0
    for _ in range(ahead):
        intake.arrived()


def called(method: str) -> Any:
    return SimpleNamespace(method=method, invocation_metadata=())


def test_a_flood_begins_with_two_long_waits_and_ends_with_a_short_one() -> None:
    clock = Clock()
    intake = Intake(clock)
    wait(intake, clock, 0.04)
    assert not intake.is_flooded(clock.now), "once is a stall"
    wait(intake, clock, 0.001)
    wait(intake, clock, 0.04)
    assert not intake.is_flooded(clock.now), "twice, but not running"
    wait(intake, clock, 0.03)
    assert intake.is_flooded(clock.now)
    wait(intake, clock, 0.01)
    assert intake.is_flooded(clock.now), "shorter than what a flood begins with, and not yet short"
    wait(intake, clock, 0.001)
    assert not intake.is_flooded(clock.now)


def test_for_a_second_it_takes_little_to_begin_a_flood_anew() -> None:
    clock = Clock()
    intake = Intake(clock)
    wait(intake, clock, 0.012)
    assert not intake.is_flooded(clock.now), "there was none before"
    wait(intake, clock, 0.06)
    assert intake.is_flooded(clock.now)
    wait(intake, clock, 0.001)
    assert not intake.is_flooded(clock.now)
    wait(intake, clock, 0.009)
    assert not intake.is_flooded(clock.now)
    wait(intake, clock, 0.012)
    assert intake.is_flooded(clock.now), "those who made it are still there"
    wait(intake, clock, 0.001)
    assert not intake.is_flooded(clock.now)
    clock.now += 1.0
    wait(intake, clock, 0.03)
    assert not intake.is_flooded(clock.now), "a second later once is a stall again"


def test_who_still_waits_counts_by_now() -> None:
    clock = Clock()
    intake = Intake(clock)
    wait(intake, clock, 0.03)
    send(intake, clock)
    assert not intake.is_flooded(clock.now + 0.015)
    assert intake.is_flooded(clock.now + 0.025)
    assert intake.wait_seconds(clock.now + 0.03) == pytest.approx(0.03)


def test_one_wait_that_is_very_long_is_enough() -> None:
    clock = Clock()
    intake = Intake(clock)
    send(intake, clock)
    assert not intake.is_flooded(clock.now + 0.04)
    assert intake.is_flooded(clock.now + 0.06)


def test_a_busy_machine_is_no_flood() -> None:
    """Few calls waited long: there is nobody whose refusal would make the others quicker."""
    clock = Clock()
    intake = Intake(clock)
    for _ in range(3):
        wait(intake, clock, 0.5, ahead=12)
        assert not intake.is_flooded(clock.now)
    assert intake.wait_seconds(clock.now) == pytest.approx(0.5), "and it can be seen"
    send(intake, clock, ahead=12)
    assert not intake.is_flooded(clock.now + 1.0)
    for _ in range(2):
        wait(intake, clock, 0.5)
    assert intake.is_flooded(clock.now)
    wait(intake, clock, 0.5, ahead=3)
    assert not intake.is_flooded(clock.now), "those who waited are gone"


def test_nobody_else_ends_the_wait() -> None:
    clock = Clock()
    intake = Intake(clock)
    intake._sent_at = clock.now
    clock.now += 0.5
    intake.service(called("/luthier.Intake/0123"))
    assert intake.wait_seconds(clock.now) == pytest.approx(0.5)
    assert Intake().method != intake.method


async def test_in_a_flood_nobody_begins_but_those_whose_slots_are_their_own() -> None:
    clock = Clock()
    intake = Intake(clock)
    users = Gate("reads", Slots(running=4, wait_seconds=1.0, overload_wait_seconds=0.1), intake, clock)
    workers = Gate("workers", Slots(running=4), intake, clock)
    ticket = await users.enter(HOME)
    for _ in range(2):
        wait(intake, clock, 0.03)
    with pytest.raises(ResourceExhausted):
        await users.enter(HOME)
    workers.leave(await workers.enter(HOME))
    users.leave(ticket)
    wait(intake, clock, 0.001)
    users.leave(await users.enter(HOME))


async def test_a_server_measures_while_calls_come_and_rests_when_none_do(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[float] = []
    over = Intake._over

    def seen(self: Intake, seconds: float) -> None:
        sent.append(seconds)
        over(self, seconds)

    monkeypatch.setattr(Intake, "_over", seen)
    await asyncio.sleep(0.2)
    assert sent == [], "nobody calls"
    until = time.monotonic() + 0.5
    while time.monotonic() < until:
        await site.create()
    assert len(sent) >= 3
    assert all(0 < seconds < 5 for seconds in sent)
    await asyncio.sleep(0.3)
    before = len(sent)
    await asyncio.sleep(0.3)
    assert len(sent) == before
    # It is no call of anybody's.
    assert "luthier.Intake" not in await metrics_of(site)


async def test_a_server_that_stands_still_is_flooded_by_those_who_came_meanwhile(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each call that begins takes 30 ms of the loop, as nothing should: those that wait behind it are told to go."""
    monkeypatch.setattr(module, "_CALM_SECONDS", 0.01)

    async def stand_still() -> None:
        time.sleep(0.03)  # noqa: ASYNC251 - the loop is to stand still

    site.echo.behave = stand_still
    codes: list[Any] = []

    async def call() -> None:
        try:
            await site.create()
        except aio.AioRpcError as error:
            codes.append(error.code())

    await asyncio.gather(*(call() for _ in range(200)))
    assert grpc.StatusCode.RESOURCE_EXHAUSTED in codes
    site.echo.behave = lambda: None
    async with asyncio.timeout(10):
        while True:
            try:
                await site.create()
            except aio.AioRpcError:
                await asyncio.sleep(0.02)
            else:
                break


@pytest.mark.parametrize("authorization", ["", "Bearer nobodys"])
async def test_those_without_a_key_bring_no_flood_upon_those_with_one(
    site: Site, monkeypatch: pytest.MonkeyPatch, authorization: str
) -> None:
    """They are not refused for it, so that to refuse others would end nothing."""
    monkeypatch.setattr(module, "_FEWEST_AHEAD", 1)
    monkeypatch.setattr(module, "_FLOOD_SECONDS", 0.0)
    monkeypatch.setattr(module, "_CALM_SECONDS", 0.001)
    counted: list[None] = []
    arrived = Intake.arrived

    def seen(self: Intake) -> None:
        counted.append(None)
        arrived(self)

    monkeypatch.setattr(Intake, "arrived", seen)
    metadata = (("authorization", authorization),) if authorization else ()

    async def call() -> grpc.StatusCode:
        with pytest.raises(aio.AioRpcError) as caught:
            await site.create(metadata=metadata)
        return caught.value.code()

    codes = await asyncio.gather(*(call() for _ in range(100)))
    assert set(codes) == {grpc.StatusCode.UNAUTHENTICATED}
    assert counted == []
    await site.create()
    assert len(counted) == 1


async def test_measuring_begins_again_after_it_failed(
    site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "_LONGEST_SECONDS", 0.05)
    sent: list[None] = []

    async def fails_once(self: Intake, call: Any) -> None:
        sent.append(None)
        if len(sent) == 1:
            raise LookupError("a broken channel")

    monkeypatch.setattr(Intake, "_send", fails_once)
    until = time.monotonic() + 5
    while len(sent) < 3 and time.monotonic() < until:
        await site.create()
    assert len(sent) >= 3
    assert [one.exc_info for one in caplog.records if "it cannot be measured" in one.message]


async def test_a_method_that_is_not_there_is_unimplemented_to_everybody(site: Site) -> None:
    for method in ("/luthier.Intake/0123", "/luthier.v1.DataService/NoSuchMethod"):
        call: Any = site.wire.unary_unary(method)
        with pytest.raises(aio.AioRpcError) as caught:
            await call(b"")
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
