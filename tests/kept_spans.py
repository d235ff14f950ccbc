"""Spans of this process, kept in memory for tests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from luthier.runtime.otel import OtelTracer
from luthier.runtime.tracing import kept_by


class Kept:
    """What was kept so far."""

    def __init__(self, exporter: InMemorySpanExporter) -> None:
        self._exporter = exporter

    @property
    def all(self) -> Sequence[ReadableSpan]:
        return self._exporter.get_finished_spans()

    def named(self, name: str) -> list[ReadableSpan]:
        """Those of a name, in the order of their ends."""
        return [span for span in self.all if span.name == name]

    def one(self, name: str) -> ReadableSpan:
        (found,) = self.named(name)
        return found

    def below(self, parent: ReadableSpan) -> list[str]:
        """Names of what is directly part of a span."""
        return [span.name for span in self.all if span.parent and span.parent.span_id == id_of(parent)]


def id_of(span: ReadableSpan) -> int:
    assert span.context is not None
    return int(span.context.span_id)


def trace_of(span: ReadableSpan) -> str:
    assert span.context is not None
    return f"{span.context.trace_id:032x}"


@contextmanager
def kept_spans(share: float = 1.0) -> Iterator[Kept]:
    """Keep this process's spans for the length of a block."""
    exporter = InMemorySpanExporter()
    with kept_by(OtelTracer(SimpleSpanProcessor(exporter), share)):
        yield Kept(exporter)
