"""The client's spans, in a program that uses OpenTelemetry: one a call, ended once, with what was carried."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from luthier.client import spans
from luthier.client.channels import Stubs
from luthier.errors import NotFound


def get_dataset(stubs: Stubs) -> Any:
    return stubs.data.GetDataset


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    provider, exporter = TracerProvider(shutdown_on_exit=False), InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
    yield exporter
    provider.shutdown()


def test_a_call_is_a_span_and_carries_it(kept: InMemorySpanExporter) -> None:
    with spans.calling(get_dataset) as metadata:
        carried = dict(metadata)["traceparent"]
    (span,) = kept.get_finished_spans()
    assert (span.name, span.kind) == ("luthier.v1.DataService/GetDataset", SpanKind.CLIENT)
    assert span.context is not None
    version, trace_id, span_id, flags = carried.split("-")
    wanted = ("00", f"{span.context.trace_id:032x}", f"{span.context.span_id:016x}")
    assert (version, trace_id, span_id) == wanted
    assert int(flags, 16) & 1, "it is kept"
    assert span.status.is_unset


def test_why_a_call_failed_is_told_once(kept: InMemorySpanExporter) -> None:
    begun = spans.begun(get_dataset)
    begun.end(NotFound("no such data set"))
    begun.end()
    (span,) = kept.get_finished_spans()
    assert (span.status.status_code, span.status.description) == (StatusCode.ERROR, "no such data set")
    assert dict(span.attributes or {})["luthier.reason"] == "RESOURCE_NOT_FOUND"


def test_a_program_without_opentelemetry_pays_nothing() -> None:
    code = (
        "import sys\n"
        "from luthier.client import Client, spans\n"
        "with spans.calling(lambda stubs: stubs.data.GetDataset) as metadata:\n"
        "    assert metadata == ()\n"
        "assert not any(name.startswith('opentelemetry') for name in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
