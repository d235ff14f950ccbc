"""What /metrics says of calls: streams apart, why they fail, who is connected, how large messages are."""

from __future__ import annotations

import asyncio
import re
import urllib.request

import grpc
import pytest
from prometheus_client import CollectorRegistry
from tests.runtime.conftest import SERVICE, Site

from luthier.errors import Reason, ResourceExhausted
from luthier.runtime.call_metrics import CODES, CallMetrics
from luthier.runtime.calls import Call
from luthier.runtime.catalogue import calls


async def page(site: Site) -> str:
    url = f"http://127.0.0.1:{site.running.metrics_port}/metrics"
    return await asyncio.to_thread(lambda: urllib.request.urlopen(url).read().decode())


async def until(site: Site, wanted: str) -> str:
    """The page once a line is on it: a caller has the answer before it is counted."""
    async with asyncio.timeout(20):
        text = await page(site)
        while wanted not in text:
            text = await page(site)
    return text


def of_stream(name: str) -> str:
    return f'{name}{{grpc_method="Stream",grpc_service="{SERVICE}",grpc_type="server_stream"}}'


async def test_a_stream_is_in_flight_while_it_lasts_and_is_no_latency(site: Site) -> None:
    stream = site.stream()
    await stream.read()
    await until(site, f"{of_stream('luthier_grpc_in_flight')} 1.0")
    stream.cancel()
    text = await until(site, f"{of_stream('luthier_grpc_stream_seconds_count')} 1.0")
    assert f"{of_stream('luthier_grpc_in_flight')} 0.0" in text
    assert 'grpc_server_handling_seconds_count{grpc_method="Create"' in text
    assert 'grpc_server_handling_seconds_count{grpc_method="Stream"' not in text


def test_what_is_shed_is_counted_once_somebody_looks_and_never_timed() -> None:
    registry = CollectorRegistry()
    metrics = CallMetrics(registry)
    for _ in range(3):
        metrics.shed(f"/{SERVICE}/Create", "unary")
    of_method = {"grpc_type": "unary", "grpc_service": SERVICE, "grpc_method": "Create"}
    for _ in range(2):
        told = {
            (sample.name, sample.labels.get("grpc_code")): sample.value
            for family in registry.collect()
            for sample in family.samples
            if sample.labels.items() >= of_method.items() or sample.labels.get("reason") == "OVERLOADED"
        }
        assert told["grpc_server_started_total", None] == 3
        assert told["grpc_server_handled_total", "ResourceExhausted"] == 3
        assert told["luthier_grpc_failed_total", "ResourceExhausted"] == 3
        assert told["grpc_server_handling_seconds_count", None] == 0


async def test_why_calls_fail_is_counted(site: Site) -> None:
    def refuse() -> None:
        raise ResourceExhausted("no", reason=Reason.DISK_FULL)

    site.echo.behave = refuse
    with pytest.raises(grpc.aio.AioRpcError):
        await site.create()
    await until(
        site,
        f'luthier_grpc_failed_total{{grpc_code="ResourceExhausted",grpc_service="{SERVICE}",reason="DISK_FULL"}} 1.0',
    )


async def test_sizes_of_messages_are_measured(site: Site) -> None:
    await site.create()
    text = await page(site)
    for way in ("received", "sent"):
        found = re.search(
            rf'^luthier_grpc_{way}_bytes_sum{{grpc_service="{SERVICE}",grpc_type="unary"}} ([\d.]+)$',
            text,
            re.MULTILINE,
        )
        assert found is not None
        assert 5 <= float(found[1]) <= 50


def ended(reason: str, code: grpc.StatusCode) -> Call:
    call = object.__new__(Call)
    call.trace_id = ""
    call.method, call.type, call.code, call.reason = f"/{SERVICE}/Create", "unary", code, reason
    call.received = call.sent = 1
    return call


def test_a_flood_of_reasons_makes_few_series() -> None:
    registry = CollectorRegistry()
    metrics = CallMetrics(registry)
    for number in range(2000):
        call = ended(f"REASON_{number}", grpc.StatusCode.INTERNAL)
        metrics.started(call)
        metrics.handled(call, 0.001)
    series = [
        sample
        for family in registry.collect()
        for sample in family.samples
        if sample.name == calls.FAILED.name
    ]
    assert [(sample.labels["reason"], sample.value) for sample in series] == [("OTHER", 2000.0)]


def test_codes_are_gos() -> None:
    assert CODES[grpc.StatusCode.INVALID_ARGUMENT] == "InvalidArgument"
    assert CODES[grpc.StatusCode.CANCELLED] == "Canceled"
    assert CODES[grpc.StatusCode.OK] == "OK"
