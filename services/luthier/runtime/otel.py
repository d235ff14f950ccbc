"""Traces by OpenTelemetry. Imported only where they are kept: its packages are an extra."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from luthier.runtime.tracing import HEADER, Attributes, Kind, Span

_KINDS = {"internal": SpanKind.INTERNAL, "server": SpanKind.SERVER}
_FORMAT = TraceContextTextMapPropagator()
_SEND_SECONDS = 2.0
_logger = logging.getLogger(__name__)


class OtelSpan:
    """One of OpenTelemetry's spans."""

    def __init__(self, made: trace.Span) -> None:
        self._made = made
        context = made.get_span_context()
        trace_id = trace.format_trace_id(context.trace_id)
        self.trace_id = trace_id if made.is_recording() else ""
        flags = f"{context.trace_flags:02x}"
        self.traceparent = f"00-{trace_id}-{trace.format_span_id(context.span_id)}-{flags}"

    def note(self, attributes: Attributes) -> None:
        """Add attributes."""
        self._made.set_attributes(attributes)

    def failed(self, why: str) -> None:
        """Set the status ERROR."""
        self._made.set_status(Status(StatusCode.ERROR, why))


class OtelTracer:
    """Keeps spans by a processor.

    Args:
        processor: takes them, and sends them on.
        share: of traces that begin here those that are kept.
        process: what this one is, for `service.name`.
        instance: tells it from others that are alike.
        abandon: makes the processor give up what it has not sent.
    """

    def __init__(
        self,
        processor: SpanProcessor,
        share: float = 1.0,
        process: str = "test",
        instance: str = "",
        abandon: Callable[[], object] = lambda: None,
    ) -> None:
        self._abandon = abandon
        resource = {
            "service.namespace": "luthier",
            "service.name": f"luthier-{process}",
            "service.version": version("luthier"),
        }
        if instance:
            resource["service.instance.id"] = instance
        # Not by `Resource.create`, which reads an environment that is nobody's setting of ours.
        self._provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(share)),
            resource=Resource(resource),
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("luthier", version("luthier"))

    @contextmanager
    def span(
        self, name: str, kind: Kind, parent: str | None, links: Sequence[str], attributes: Attributes
    ) -> Iterator[Span]:
        """Keep what a block does; see `tracing.span`."""
        with self._tracer.start_as_current_span(
            name,
            context=None if parent is None else _context(parent),
            kind=_KINDS[kind],
            attributes=attributes,
            links=[Link(found) for found in map(_named, links) if found.is_valid],
            record_exception=False,
            set_status_on_exception=False,
        ) as made:
            yield OtelSpan(made)

    def past(self, name: str, seconds: float, attributes: Attributes, failed: str) -> None:
        """Keep a span that ends now."""
        if trace.get_current_span().is_recording():
            now = time.time_ns()
            began = now - round(seconds * 1e9)
            made = self._tracer.start_span(name, attributes=attributes, start_time=began)
            if failed:
                made.set_status(Status(StatusCode.ERROR, failed))
            made.end(now)

    def current(self) -> OtelSpan | None:
        """Return the span that is current."""
        found = trace.get_current_span()
        return OtelSpan(found) if found.get_span_context().is_valid else None

    def close(self, seconds: float) -> None:
        """Send what is not sent yet, for so long at most: a receiver that is away must not hold up the end."""
        # In a thread, as the SDK's own limits hold for each batch, or not at all.
        sending = threading.Thread(target=self._provider.shutdown, name="last-spans", daemon=True)
        sending.start()
        sending.join(seconds)
        if sending.is_alive():
            _logger.warning("the last spans are lost: their receiver does not take them")
            self._abandon()


def otlp_tracer(address: str, share: float, process: str, instance: str) -> OtelTracer:
    """Return what sends spans to a receiver of OTLP, from a thread of its own, a batch every few seconds."""
    is_secure = address.startswith("https://")
    exporter = OTLPSpanExporter(endpoint=address, insecure=not is_secure, timeout=_SEND_SECONDS)
    return OtelTracer(BatchSpanProcessor(exporter), share, process, instance, exporter.shutdown)


def _context(parent: str) -> Context:
    """Return the context of a span elsewhere: of none where it is empty or no `traceparent`."""
    return _FORMAT.extract({HEADER: parent}, Context())


def _named(parent: str) -> SpanContext:
    return trace.get_current_span(_context(parent)).get_span_context()
