"""Traces: what a call or an attempt was made of, and how long each part took. Off unless a process is told where to.

Whoever does something worth knowing says so here and needs to know no more: `runtime.otel` is what sends it.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol

from luthier.errors import FailedPrecondition, InvalidArgument
from luthier.runtime.addresses import is_loopback
from luthier.runtime.config import others, read

HEADER = "traceparent"
"""Where a call carries the span that it is part of, as W3C Trace Context has it."""
Kind = Literal["internal", "server"]
Attributes = Mapping[str, str | int | float]
_FLUSH_SECONDS = 3.0


class Span(Protocol):
    """Something that is being done.

    Attributes:
        trace_id: of what it is part of, in hex; empty: nobody keeps it.
        traceparent: what others need to be part of it, or to keep nothing where it is not kept; empty: there is none.
    """

    trace_id: str
    traceparent: str

    def note(self, attributes: Attributes) -> None:
        """Add what is known of it only now."""
        ...

    def failed(self, why: str) -> None:
        """Say that it did not come to what it should."""
        ...


class Tracer(Protocol):
    """Keeps spans."""

    def span(
        self, name: str, kind: Kind, parent: str | None, links: Sequence[str], attributes: Attributes
    ) -> AbstractContextManager[Span]:
        """Return a span of the length of a block; see `span`."""
        ...

    def past(self, name: str, seconds: float, attributes: Attributes, failed: str) -> None:
        """Keep a span that ends now, as part of the one that is current; `failed` says why it did, if it did."""
        ...

    def current(self) -> Span | None:
        """Return the span that the caller is in."""
        ...

    def close(self, seconds: float) -> None:
        """Send what is not sent yet, for so long at most."""
        ...


class _Nothing:
    """A span that nobody keeps."""

    trace_id = ""
    traceparent = ""

    def note(self, attributes: Attributes) -> None:
        pass

    def failed(self, why: str) -> None:
        pass


NOTHING: Span = _Nothing()
"""A span that nobody keeps."""
_tracer: Tracer | None = None


def is_on() -> bool:
    """Tell whether this process keeps traces."""
    return _tracer is not None


@contextmanager
def span(
    name: str,
    *,
    kind: Kind = "internal",
    parent: str | None = None,
    links: Sequence[str] = (),
    attributes: Attributes | None = None,
) -> Iterator[Span]:
    """Keep what a block does as a span, which is current meanwhile.

    Args:
        name: of few values: a method, a kind of task.
        kind: server: it answers a call.
        parent: the `traceparent` of what it is part of; empty: of nothing, it begins a trace. None: of the span that is
            current, and where there is none nothing is kept.
        links: `traceparent`s of spans that belong to it and are not its parents.
        attributes: what is known of it.
    """
    tracer = _tracer
    if tracer is None or (parent is None and tracer.current() is None):
        yield NOTHING
        return
    with tracer.span(name, kind, parent, links, attributes or {}) as made:
        yield made


def past(name: str, seconds: float, attributes: Attributes | None = None, *, failed: str = "") -> None:
    """Keep what just ended after so many seconds, as part of the span that is current; where there is none, nothing."""
    if _tracer is not None:
        _tracer.past(name, seconds, attributes or {}, failed)


def current() -> Span:
    """Return the span that the caller is in: one that says nothing where there is none."""
    return (_tracer.current() if _tracer is not None else None) or NOTHING


def carried() -> tuple[tuple[str, str], ...]:
    """Return the metadata by which a call becomes part of the span that is current; empty: there is none."""
    parent = current().traceparent
    return ((HEADER, parent),) if parent else ()


@contextmanager
def kept_by(tracer: Tracer) -> Iterator[None]:
    """Have this process's traces kept for the length of a block; then what is left is sent."""
    global _tracer  # noqa: PLW0603 - as logging, it is of the process
    assert _tracer is None, "a process has one tracer"
    _tracer = tracer
    try:
        yield
    finally:
        _tracer = None
        tracer.close(_FLUSH_SECONDS)


@dataclass(frozen=True, slots=True, kw_only=True)
class TracesConfig:
    """Where traces go: section TRACES of the environment, the same for all processes."""

    address: str = ""
    """A receiver of OTLP over gRPC: host:port on loopback, or https://host:port. Empty: nothing is kept."""
    share: float = 1.0
    """Of the traces that begin here those that are kept, from 0 to 1; what a caller keeps is kept."""


@contextmanager
def traced(process: str, instance: str = "") -> Iterator[None]:
    """Send this process's traces where the environment says for the length of a block; nowhere where it does not.

    Args:
        process: what it is, `data` or `training-worker` say.
        instance: tells it from others that are alike.

    Raises:
        InvalidArgument: the address or the share is none, or OpenTelemetry is told to keep nothing.
        FailedPrecondition: the extra `otel` is not installed.
    """
    config = traces_config()
    if not config.address:
        yield
        return
    with kept_by(_otlp_tracer(config, process, instance)):
        yield


def traces_config() -> TracesConfig:
    """Return where the environment says that traces go, and look whether they can: the address may be empty.

    Raises:
        InvalidArgument: the address or the share is none, or OpenTelemetry is told to keep nothing.
        FailedPrecondition: the extra `otel` is not installed.
    """
    config = read(TracesConfig, section="TRACES")
    if config.address:
        _check(config)
        _require_otel()
    return config


def _require_otel() -> None:
    try:
        # All that it needs, of which other packages may have brought a part.
        importlib.import_module("luthier.runtime.otel")
    except ImportError as error:
        raise FailedPrecondition(
            "LUTHIER_TRACES_ADDRESS needs the packages of the extra otel: pip install 'luthier[otel]' "
            f"({error})"
        ) from error


def _otlp_tracer(config: TracesConfig, process: str, instance: str) -> Tracer:
    from luthier.runtime.otel import otlp_tracer

    return otlp_tracer(config.address, config.share, process, instance)


def _check(config: TracesConfig) -> None:
    host, _, port = config.address.removeprefix("https://").rpartition(":")
    is_safe = config.address.startswith("https://") or (bool(host) and is_loopback(host))
    if not host or not port.isdigit() or int(port) > 65535 or not is_safe:
        raise InvalidArgument(
            "LUTHIER_TRACES_ADDRESS must be host:port on loopback or https://host:port, as names of jobs travel "
            f"there, got {config.address!r}"
        )
    if (others().get("OTEL_SDK_DISABLED") or "").strip().lower() == "true":
        raise InvalidArgument(
            "OTEL_SDK_DISABLED=true and LUTHIER_TRACES_ADDRESS cannot both be set: nothing would be kept where "
            f"{config.address} is to get traces; unset one of them"
        )
    if not 0 <= config.share <= 1:
        raise InvalidArgument(f"LUTHIER_TRACES_SHARE must be in 0..1, got {config.share}")
