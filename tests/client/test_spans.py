"""The client's spans, in a program that uses OpenTelemetry: one a call, ended once, with what was carried."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from opentelemetry import propagate, trace
from opentelemetry.context import Context
from opentelemetry.propagators.textmap import (
    Getter,
    Setter,
    TextMapPropagator,
    default_getter,
    default_setter,
)
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from luthier.client import AsyncClient, Client, ClientConfig, spans
from luthier.client.channels import Stubs
from luthier.errors import Internal, NotFound
from luthier.v1.dataset_pb2 import Dataset


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
    begun.end(NotFound("line 3 is no record: {'secret': 1}"))
    begun.end()
    (span,) = kept.get_finished_spans()
    assert (span.status.status_code, span.status.description) == (StatusCode.ERROR, "RESOURCE_NOT_FOUND")
    assert dict(span.attributes or {})["luthier.reason"] == "RESOURCE_NOT_FOUND"


class Carrying(TextMapPropagator):
    """Carries a span under a key of its own, as the propagators of vendors do."""

    def __init__(self, key: str) -> None:
        self._key = key

    @property
    def fields(self) -> set[str]:
        return {self._key}

    def inject(
        self,
        carrier: Any,
        context: Context | None = None,
        setter: Setter[Any] = default_setter,
    ) -> None:
        setter.set(carrier, self._key, "Root=1")

    def extract(
        self, carrier: Any, context: Context | None = None, getter: Getter[Any] = default_getter
    ) -> Context:
        raise NotImplementedError


@pytest.fixture
def carried_under() -> Iterator[Callable[[str], None]]:
    before = propagate.get_global_textmap()
    yield lambda key: propagate.set_global_textmap(Carrying(key))
    propagate.set_global_textmap(before)


async def test_whatever_key_a_propagator_has_calls_carry_it(
    kept: InMemorySpanExporter,
    carried_under: Callable[[str], None],
    services: Any,
    client: Client,
    async_client: AsyncClient,
) -> None:
    carried_under("X-Upper")
    services.answers["GetDataset"] = lambda request, context: Dataset(name=request.name)
    client.datasets.get("a")
    assert services.metadata["GetDataset"]["x-upper"] == "Root=1"
    await async_client.datasets.get("b")
    assert services.calls["GetDataset"] == 2
    assert [span.status.is_unset for span in kept.get_finished_spans()] == [True, True]


async def test_the_span_of_a_stream_that_cannot_begin_ends(
    kept: InMemorySpanExporter, config: ClientConfig
) -> None:
    with Client(config) as client:
        for channel in client._driver._connected().channels:
            channel.close()
        with pytest.raises(ValueError, match="Channel closed"):
            next(client.generate("m", "hello"))
    async with AsyncClient(config) as async_client:
        channels: Any = async_client._driver._connected().channels
        for channel in channels:
            await channel.close()
        with pytest.raises(Exception, match="closed"):
            await anext(async_client.generate("m", "hello"))
    ended = [(span.name.rpartition("/")[2], span.status.description) for span in kept.get_finished_spans()]
    assert ended == [("GenerateText", "ValueError"), ("GenerateText", "UsageError")]


async def test_the_span_of_a_stream_that_grpc_refuses_ends(
    kept: InMemorySpanExporter,
    carried_under: Callable[[str], None],
    client: Client,
    async_client: AsyncClient,
) -> None:
    carried_under("no key")
    with pytest.raises(Internal, match="metadata"):
        next(client.generate("m", "hello"))
    with pytest.raises(Exception, match="metadata"):
        await anext(async_client.generate("m", "hello"))
    assert [span.status.status_code for span in kept.get_finished_spans()] == [StatusCode.ERROR] * 2


def test_a_program_without_opentelemetry_pays_nothing() -> None:
    code = (
        "import sys\n"
        "from luthier.client import Client, spans\n"
        "with spans.calling(lambda stubs: stubs.data.GetDataset) as metadata:\n"
        "    assert metadata == ()\n"
        "assert not any(name.startswith('opentelemetry') for name in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
