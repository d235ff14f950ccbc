"""Who is let in when many come: slots by kind of caller, waits that are short, refusals that are quick."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import status_pb2
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from tests.runtime.conftest import SERVICE, Create, Site, serve
from tests.runtime.test_server import metrics_of, refusal

from luthier.errors import NotFound, Reason, ResourceExhausted
from luthier.runtime import admission, calls
from luthier.runtime.admission import Gate, Limits, Slots
from luthier.worker.v1 import worker_service_pb2, worker_service_pb2_grpc

HOME = "ipv4:127.0.0.1"
FEW = Limits(
    probes=Slots(running=4),
    probe_streams=Slots(running=8, per_address=6),
    reads=Slots(running=2),
    streams=Slots(running=3),
)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def waiting_gate(**slots: Any) -> Gate:
    return Gate("reads", Slots(running=1, wait_seconds=0.3, overload_wait_seconds=0.05, **slots))


async def test_a_slot_that_is_given_back_goes_to_whom_waited_longest() -> None:
    gate = waiting_gate()
    held = await gate.enter(HOME)
    order: list[int] = []

    async def come(number: int) -> None:
        ticket = await gate.enter(HOME)
        order.append(number)
        gate.leave(ticket)

    comers = [asyncio.create_task(come(number)) for number in range(5)]
    await asyncio.sleep(0)
    assert (gate.running, gate.waiting) == (1, 5)
    gate.leave(held)
    await asyncio.gather(*comers)
    assert order == [0, 1, 2, 3, 4]
    assert (gate.running, gate.waiting) == (0, 0)


async def test_who_would_wait_too_long_is_refused_at_once_and_told_when_to_return() -> None:
    gate = Gate("reads", Slots(running=1))
    await gate.enter(HOME)
    with pytest.raises(ResourceExhausted, match="counted as reads") as caught:
        await gate.enter(HOME)
    assert caught.value.reason == "OVERLOADED"
    assert caught.value.retry_after_seconds is not None
    assert 0.2 <= caught.value.retry_after_seconds <= 1.0


async def test_in_a_burst_the_wait_is_longer_than_in_overload() -> None:
    gate = waiting_gate()
    held = await gate.enter(HOME)
    loop = asyncio.get_running_loop()
    began = loop.time()
    with pytest.raises(ResourceExhausted):
        await gate.enter(HOME)
    assert loop.time() - began > 0.25, "nobody had been refused"
    began = loop.time()
    with pytest.raises(ResourceExhausted):
        await gate.enter(HOME)
    assert loop.time() - began < 0.25, "somebody had been, a moment ago"
    gate.leave(held)


async def test_a_caller_that_goes_away_while_it_waits_takes_no_slot_along() -> None:
    gate = waiting_gate()
    held = await gate.enter(HOME)
    gone, stays = (asyncio.create_task(gate.enter(HOME)) for _ in range(2))
    await asyncio.sleep(0)
    gone.cancel()
    await asyncio.sleep(0)
    gate.leave(held)
    gate.leave(await stays)
    # Also in the moment between being given a slot and taking it.
    held = await gate.enter(HOME)
    gone = asyncio.create_task(gate.enter(HOME))
    await asyncio.sleep(0)
    gate.leave(held)
    gone.cancel()
    with pytest.raises(asyncio.CancelledError):
        await gone
    assert (gate.running, gate.waiting) == (0, 0)


async def test_calls_that_wait_for_something_else_do_not_keep_others_out() -> None:
    clock = Clock()
    slots = Slots(running=1, patience_seconds=1.0, lingering=2)
    gate = Gate("reads", slots, clock=clock)
    tickets = [await gate.enter(HOME)]
    for _ in range(2):
        with pytest.raises(ResourceExhausted):
            await gate.enter(HOME)
        clock.now += 1.0
        tickets.append(await gate.enter(HOME))
    clock.now += 1.0
    with pytest.raises(ResourceExhausted):
        await gate.enter(HOME)
    assert gate.running == 3
    for ticket in tickets:
        gate.leave(ticket)
    assert gate.running == 0


async def test_one_address_cannot_take_every_slot() -> None:
    gate = Gate("probe_streams", Slots(running=5, per_address=2))
    tickets = [await gate.enter(HOME) for _ in range(2)]
    with pytest.raises(ResourceExhausted, match="from one address"):
        await gate.enter(HOME)
    gate.leave(await gate.enter("ipv4:10.0.0.1"))
    gate.leave(tickets.pop())
    await gate.enter(HOME)


@pytest.fixture
async def small(tmp_path: Path) -> AsyncIterator[Site]:
    async with serve(tmp_path / "home", limits=FEW) as served:
        yield served


async def opened(stream: Any) -> Any:
    """Wait for a stream's first message."""
    first = await stream.read()
    assert first is not aio.EOF
    return stream


@pytest.fixture
async def manned(tmp_path: Path) -> AsyncIterator[Site]:
    """Takes heartbeats of workers, too."""
    async with serve(tmp_path / "home", with_worker_service=True) as served:
        yield served


async def test_a_thousand_callers_without_a_key_take_no_slots_of_others(manned: Site) -> None:
    health = health_pb2_grpc.HealthStub(manned.wire)
    watches = [health.Watch(health_pb2.HealthCheckRequest()) for _ in range(1000)]
    answers = await asyncio.gather(*(watch.read() for watch in watches), return_exceptions=True)
    refused = [answer for answer in answers if isinstance(answer, aio.AioRpcError)]
    assert len(refused) == 1000 - Limits().probe_streams.per_address
    for error in refused:
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        status = status_pb2.Status.FromString(dict(error.trailing_metadata())["grpc-status-details-bin"])
        kinds = [detail.TypeName() for detail in status.details]
        assert sorted(kinds) == ["google.rpc.ErrorInfo", "google.rpc.RequestInfo", "google.rpc.RetryInfo"]
    # While those that were let in stay: users, workers and probes are served.
    assert (await manned.create()).uid == "1"
    await opened(manned.stream())
    worker = manned.metadata(manned.keys.worker_key)
    beat = worker_service_pb2_grpc.WorkerServiceStub(manned.wire).Heartbeat
    for _ in range(20):
        await beat(worker_service_pb2.HeartbeatRequest(), metadata=worker, timeout=10)
    answer = await health.Check(health_pb2.HealthCheckRequest())
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
    text = await metrics_of(manned)
    assert f'luthier_calls_refused_total{{pool="probe_streams",reason="OVERLOADED"}} {len(refused)}.0' in text
    assert 'luthier_calls_refused_total{pool="workers",reason="OVERLOADED"} 0.0' in text
    assert 'luthier_calls_running{pool="probe_streams"} 32.0' in text
    for watch in watches:
        watch.cancel()


async def test_calls_without_a_key_are_refused_while_every_slot_is_taken(small: Site) -> None:
    small.echo.behave = lambda: asyncio.sleep(1.0)
    busy = [asyncio.ensure_future(small.create()) for _ in range(2)]
    await until_running(small, "reads", 2)
    error, details = await refusal(small.create(metadata=()))
    assert error.code() is grpc.StatusCode.UNAUTHENTICATED
    error, details = await refusal(small.create())
    assert details["ErrorInfo"].reason == "OVERLOADED"
    assert details["ErrorInfo"].metadata["pool"] == "reads"
    assert details["RetryInfo"].retry_delay.ToMilliseconds() >= 200
    for call in busy:
        await call
    assert (await small.create()).uid == "3"


async def running(site: Site, pool: str) -> int:
    text = await metrics_of(site)
    (line,) = [one for one in text.splitlines() if one.startswith(f'luthier_calls_running{{pool="{pool}"}}')]
    return int(float(line.rpartition(" ")[2]))


async def until_running(site: Site, pool: str, calls: int) -> None:
    async with asyncio.timeout(5):
        while await running(site, pool) != calls:  # noqa: ASYNC110 - seen from outside, nothing tells when
            await asyncio.sleep(0.02)


async def test_streams_and_unary_calls_of_users_have_slots_of_their_own(small: Site) -> None:
    streams = [await opened(small.stream()) for _ in range(3)]
    with pytest.raises(aio.AioRpcError) as caught:
        await opened(small.stream())
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert (await small.create()).uid == "1"
    streams.pop().cancel()
    await until_running(small, "streams", 2)
    await opened(small.stream())


async def test_a_flood_is_refused_in_few_log_lines(
    small: Site, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A library that another test uses switches off the loggers that are there when it sets up its own.
    monkeypatch.setattr(logging.getLogger("luthier.access"), "disabled", False)
    caplog.set_level("INFO", "luthier.access")
    small.echo.behave = lambda: asyncio.sleep(0.5)
    answers = await asyncio.gather(*(small.create() for _ in range(100)), return_exceptions=True)
    refused = [answer for answer in answers if isinstance(answer, aio.AioRpcError)]
    assert len(refused) >= 90
    lines = [one for one in caplog.records if "RESOURCE_EXHAUSTED" in one.getMessage()]
    assert 1 <= len(lines) <= 5
    assert (
        f'luthier_calls_refused_total{{pool="reads",reason="OVERLOADED"}} {len(refused)}.0'
        in await metrics_of(small)
    )


async def test_a_request_whose_message_never_comes_gives_its_slot_back(
    small: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "BODY_SECONDS", 0.2)
    opening: Any = small.wire.stream_unary(f"/{SERVICE}/Create")
    silent = opening(metadata=small.metadata())
    with pytest.raises(aio.AioRpcError) as caught:
        await silent
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    empty = opening(metadata=small.metadata())
    await empty.done_writing()
    error, details = await refusal(empty)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "must send one message" in details["message"]
    assert await running(small, "reads") == 0
    assert (await small.create(Create(parent="projects/p"))).uid == "1"


async def test_a_health_watch_ends(small: Site) -> None:
    small.running.health._watch_seconds = 0.2
    watch = health_pb2_grpc.HealthStub(small.wire).Watch(health_pb2.HealthCheckRequest())
    async with asyncio.timeout(5):
        answers = [answer.status async for answer in watch]
    assert answers == [health_pb2.HealthCheckResponse.SERVING]


async def test_reflection_answers_who_has_a_key(small: Site) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(small.wire)
    requests = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="luthier.v1.DataService"),
        reflection_pb2.ServerReflectionRequest(file_by_filename="\x00"),
    ]
    call = stub.ServerReflectionInfo(iter(requests), metadata=small.metadata())
    answers = [answer async for answer in call]
    names = {service.name for service in answers[0].list_services_response.service}
    assert SERVICE in names
    assert answers[1].file_descriptor_response.file_descriptor_proto
    assert answers[2].error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0]
    with pytest.raises(aio.AioRpcError) as caught:
        await stub.ServerReflectionInfo(iter(())).read()
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_what_changes_something_has_slots_apart_from_what_does_not() -> None:
    prefix = "/luthier.v1.DataService"
    pools = {
        name: admission._pool_of("unary", f"{prefix}/{name}", "key")
        for name in ("GetDataset", "CreateDataset", "CancelUpload", "ListDatasets", "Nothing")
    }
    assert pools == {
        "GetDataset": "reads",
        "CreateDataset": "writes",
        "CancelUpload": "writes",
        "ListDatasets": "reads",
        "Nothing": "reads",
    }
    assert admission._pool_of("unary", "/luthier.worker.v1.WorkerService/ClaimTask", "worker") == "workers"
    assert admission._pool_of("server_stream", f"{prefix}/ReadRecords", "task") == "workers"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ResourceExhausted("too many read already"), "OVERLOADED"),
        (ResourceExhausted("no room", reason=Reason.DISK_FULL), "DISK_FULL"),
        (ResourceExhausted("a worker says", reason="WHATEVER_IT_LIKES", metadata={"pool": "x"}), "OTHER"),
    ],
)
async def test_what_is_refused_behind_the_door_is_counted_by_its_reason(
    site: Site, error: ResourceExhausted, reason: str
) -> None:
    def refuse() -> None:
        raise error

    site.echo.behave = refuse
    for _ in range(3):
        with pytest.raises(aio.AioRpcError):
            await site.create()
    text = await metrics_of(site)
    assert f'luthier_calls_refused_total{{pool="",reason="{reason}"}} 3.0' in text
    assert 'luthier_calls_refused_total{pool="reads",reason="OVERLOADED"} 0.0' in text


async def test_no_other_error_is_counted_as_a_refusal(site: Site) -> None:
    def refuse() -> None:
        raise NotFound("none")

    site.echo.behave = refuse
    with pytest.raises(aio.AioRpcError):
        await site.create()
    lines = [
        one for one in (await metrics_of(site)).splitlines() if one.startswith("luthier_calls_refused_total")
    ]
    assert all(one.endswith(" 0.0") for one in lines)
