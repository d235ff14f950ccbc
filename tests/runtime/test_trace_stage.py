"""Each call is a span of its caller's trace, with the status that it had; its log line and its series lead there."""

from __future__ import annotations

import asyncio
import json
import logging
import urllib.request
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from opentelemetry.trace import SpanKind, StatusCode
from tests.kept_spans import Kept, kept_spans, trace_of
from tests.runtime.conftest import SERVICE, Site, serve

from luthier.errors import NotFound, Reason
from luthier.runtime.logs import JsonFormatter

CREATE, STREAM = f"{SERVICE}/Create", f"{SERVICE}/Stream"
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
OPENMETRICS = "application/openmetrics-text; version=1.0.0"
KEPT = f"00-{TRACE}-{PARENT}-01"


@pytest.fixture
def kept() -> Iterator[Kept]:
    with kept_spans() as spans:
        yield spans


@pytest.fixture
async def traced(kept: Kept, tmp_path: Path) -> AsyncIterator[Site]:
    async with serve(tmp_path / "home") as site:
        yield site


async def ended(kept: Kept, name: str) -> None:
    """A caller has its answer before the span of its call ends."""
    async with asyncio.timeout(10):
        while not kept.named(name):  # noqa: ASYNC110 - the server ends it
            await asyncio.sleep(0.01)


async def test_a_call_is_part_of_its_callers_trace(traced: Site, kept: Kept) -> None:
    await traced.create(metadata=(*traced.metadata(), ("traceparent", KEPT), ("x-request-id", "r-1")))
    await ended(kept, CREATE)
    span = kept.one(CREATE)
    assert trace_of(span) == TRACE
    assert span.parent is not None
    assert f"{span.parent.span_id:016x}" == PARENT
    assert span.kind is SpanKind.SERVER
    assert span.status.status_code is StatusCode.UNSET
    told = dict(span.attributes or {})
    assert (told["rpc.method"], told["rpc.grpc.status_code"], told["luthier.request_id"]) == (
        "Create",
        0,
        "r-1",
    )


@pytest.mark.parametrize("header", ["", "nonsense", f"00-{'0' * 32}-{PARENT}-01"])
async def test_a_call_without_a_trace_begins_one(traced: Site, kept: Kept, header: str) -> None:
    carried = (("traceparent", header),) if header else ()
    await traced.create(metadata=(*traced.metadata(), *carried))
    await ended(kept, CREATE)
    assert kept.one(CREATE).parent is None


async def test_what_a_caller_does_not_keep_is_not_kept_here(traced: Site, kept: Kept) -> None:
    await traced.create(metadata=(*traced.metadata(), ("traceparent", f"00-{TRACE}-{PARENT}-00")))
    await traced.create()
    await ended(kept, CREATE)
    assert trace_of(kept.one(CREATE)) != TRACE


async def test_a_refusal_is_an_answer_and_a_fault_is_an_error(traced: Site, kept: Kept) -> None:
    def refuse() -> None:
        raise NotFound("no such thing as x", reason=Reason.RESOURCE_NOT_FOUND)

    def fail() -> None:
        raise ZeroDivisionError

    for behave in (refuse, fail):
        traced.echo.behave = behave
        with pytest.raises(grpc.aio.AioRpcError):
            await traced.create()
    async with asyncio.timeout(10):
        while len(kept.named(CREATE)) < 2:  # noqa: ASYNC110 - the server ends them
            await asyncio.sleep(0.01)
    refused, failed = kept.named(CREATE)
    assert (refused.status.status_code, (refused.attributes or {})["luthier.reason"]) == (
        StatusCode.UNSET,
        "RESOURCE_NOT_FOUND",
    )
    assert (failed.status.status_code, failed.status.description) == (StatusCode.ERROR, "INTERNAL")


async def test_a_stream_is_a_span_until_its_end(traced: Site, kept: Kept) -> None:
    stream = traced.stream()
    await stream.read()
    assert kept.named(STREAM) == []
    stream.cancel()
    await ended(kept, STREAM)
    told = dict(kept.one(STREAM).attributes or {})
    assert told["rpc.grpc.status_code"] == grpc.StatusCode.CANCELLED.value[0]
    assert int(told["luthier.messages_sent"]) >= 1  # type: ignore[arg-type]


async def test_health_checks_are_in_no_trace(traced: Site, kept: Kept) -> None:
    await health_pb2_grpc.HealthStub(traced.wire).Check(health_pb2.HealthCheckRequest())
    await traced.create()
    await ended(kept, CREATE)
    assert {span.name for span in kept.all} == {CREATE}


async def test_a_line_says_why_a_call_failed_and_of_which_trace(
    traced: Site, kept: Kept, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse() -> None:
        raise NotFound("no such thing as x", reason=Reason.RESOURCE_NOT_FOUND)

    traced.echo.behave = refuse
    lines: list[dict[str, object]] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(json.loads(JsonFormatter().format(record)))

    keep = Keep()
    access = logging.getLogger("luthier.access")
    access.addHandler(keep)
    try:
        with caplog.at_level(logging.INFO, "luthier.access"):
            with pytest.raises(grpc.aio.AioRpcError):
                await traced.create(
                    metadata=(*traced.metadata(), ("traceparent", KEPT), ("x-request-id", "r-2"))
                )
            await ended(kept, CREATE)
    finally:
        access.removeHandler(keep)
    (line,) = lines
    wanted = {
        "code": "NOT_FOUND",
        "reason": "RESOURCE_NOT_FOUND",
        "detail": "no such thing as x",
        "subject": "projects/p",
        "request_id": "r-2",
        "trace_id": TRACE,
    }
    assert {name: line.get(name) for name in wanted} == wanted


def page(site: Site, accept: str) -> str:
    """The page of metrics as a scraper gets it that takes such a form."""
    url = f"http://127.0.0.1:{site.running.metrics_port}/metrics"
    request = urllib.request.Request(url, headers={"Accept": accept})
    return str(urllib.request.urlopen(request).read().decode())


async def led_there(site: Site) -> list[str]:
    """Names of the series that lead to the trace of KEPT, in order."""
    text = await asyncio.to_thread(page, site, OPENMETRICS)
    return sorted(line.split("{")[0] for line in text.splitlines() if f'trace_id="{TRACE}"' in line)


async def test_series_lead_to_traces_where_a_scraper_takes_openmetrics(traced: Site, kept: Kept) -> None:
    await traced.create(metadata=(*traced.metadata(), ("traceparent", KEPT)))
    await ended(kept, CREATE)
    assert await led_there(traced) == ["grpc_server_handling_seconds_bucket"]
    assert "trace_id" not in await asyncio.to_thread(page, traced, "text/plain")


async def test_failures_lead_to_the_trace_of_the_last_of_them(traced: Site, kept: Kept) -> None:
    def refuse() -> None:
        raise NotFound("no such thing as x", reason=Reason.RESOURCE_NOT_FOUND)

    traced.echo.behave = refuse
    with pytest.raises(grpc.aio.AioRpcError):
        await traced.create(metadata=(*traced.metadata(), ("traceparent", KEPT)))
    await ended(kept, CREATE)
    assert await led_there(traced) == ["grpc_server_handling_seconds_bucket", "luthier_grpc_failed_total"]
    assert "trace_id" not in await asyncio.to_thread(page, traced, "text/plain")
