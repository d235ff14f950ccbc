"""The client's part in traces: a span of each call, by OpenTelemetry, in programs that use it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from luthier.client.channels import Stubs
from luthier.errors import LuthierError
from luthier.v1.data_service_pb2_grpc import DataServiceStub
from luthier.v1.evaluation_service_pb2_grpc import EvaluationServiceStub
from luthier.v1.model_service_pb2_grpc import ModelServiceStub
from luthier.v1.training_service_pb2_grpc import TrainingServiceStub

Metadata = tuple[tuple[str, str], ...]


class _Paths:
    """A channel on which a method is its path."""

    def _path(self, path: str, *_: object, **__: object) -> str:
        return path

    unary_unary = unary_stream = stream_unary = stream_stream = _path


def _paths() -> Stubs:
    channel: Any = _Paths()
    return Stubs(
        data=DataServiceStub(channel),
        models=ModelServiceStub(channel),
        training=TrainingServiceStub(channel),
        evaluation=EvaluationServiceStub(channel),
    )


_PATHS = _paths()


class CallSpan:
    """The span of one call, from its beginning to `end`; the metadata makes the service's span a part of it."""

    def __init__(self, made: Any, metadata: Metadata) -> None:
        self._made = made
        self.metadata = metadata

    def end(self, error: BaseException | None = None) -> None:
        """Say that the call is over, and why it failed; saying so again changes nothing."""
        made, self._made = self._made, None
        if made is None:
            return
        if error is not None:
            from opentelemetry.trace import Status, StatusCode

            # Not its words: they may quote what was sent.
            why = type(error).__name__
            if isinstance(error, LuthierError):
                why = str(error.reason)
                made.set_attributes({"luthier.reason": why, "luthier.code": error.code})
            made.set_status(Status(StatusCode.ERROR, why))
        made.end()


def begun(pick: Callable[[Stubs], Any]) -> CallSpan:
    """Begin the span of a call; in a program that does not use OpenTelemetry it is nothing, and costs as much.

    A program that uses it has imported it: this package does not.
    """
    api: Any = sys.modules.get("opentelemetry.trace")
    if api is None:
        return CallSpan(None, ())
    path: Any = pick(_PATHS)
    _, service, method = path.split("/")
    made = api.get_tracer("luthier.client").start_span(
        path[1:],
        kind=api.SpanKind.CLIENT,
        attributes={"rpc.system": "grpc", "rpc.service": service, "rpc.method": method},
    )
    carrier: dict[str, str] = {}
    # By the program's own way of carrying spans, whichever that is.
    from opentelemetry.propagate import inject

    inject(carrier, context=api.set_span_in_context(made))
    # gRPC refuses a call whose keys are not in lower case, and they are the same to whoever reads them.
    return CallSpan(made, tuple((key.lower(), value) for key, value in carrier.items()))


@contextmanager
def opening(pick: Callable[[Stubs], Any]) -> Iterator[CallSpan]:
    """Begin the span of a call that a block begins, and that goes on after it; a block that raises ends the span."""
    span = begun(pick)
    try:
        yield span
    except BaseException as error:
        span.end(error)
        raise


@contextmanager
def calling(pick: Callable[[Stubs], Any]) -> Iterator[Metadata]:
    """Keep a call of the length of a block as a span; yields the metadata that goes with it."""
    with opening(pick) as span:
        yield span.metadata
        span.end()
