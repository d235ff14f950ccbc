"""The error tree as `google.rpc.Status`: as errors travel, and as failed resources hold them (AIP-193).

`luthier.errors` itself needs the standard library only, and so does not import this.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Protocol

import grpc
from google.protobuf import any_pb2
from google.protobuf.message import DecodeError, Message
from google.rpc import code_pb2, error_details_pb2, status_pb2

from luthier.errors.failure import Failure
from luthier.errors.reasons import DOMAIN
from luthier.errors.tree import BY_CODE, FieldViolation, LuthierError

DETAILS_KEY = "grpc-status-details-bin"
"""Key of the trailing metadata that carries the Status of a call; read here without the package grpcio-status."""


class FailedCall(Protocol):
    """What gRPC raises for a call, of either of its stacks."""

    def code(self) -> grpc.StatusCode:
        """Return the status code."""
        ...

    def details(self) -> str | None:
        """Return the message."""
        ...

    def trailing_metadata(self) -> Iterable[tuple[str, str | bytes]] | None:
        """Return what came after the answer."""
        ...


def failure_to_status(failure: Failure) -> status_pb2.Status:
    """Write a failure with exactly one ErrorInfo, and a RetryInfo where it says when to come back."""
    status = status_pb2.Status(code=code_pb2.Code.Value(failure.code), message=failure.message)
    info = error_details_pb2.ErrorInfo(reason=failure.reason, domain=DOMAIN, metadata=dict(failure.metadata))
    status.details.add().Pack(info)
    if failure.retry_after_seconds is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(round(failure.retry_after_seconds * 1e9))
        status.details.add().Pack(retry)
    return status


def status_to_failure(status: status_pb2.Status) -> Failure:
    """Read a failure; what cannot be read of it is as in `status_to_error`."""
    return Failure.of(status_to_error(status))


def status_to_error(
    status: status_pb2.Status, metadata: Mapping[str, str] = MappingProxyType({})
) -> LuthierError:
    """Read an error. Details that are of another kind, or mangled, are as if they had not been sent.

    Without an ErrorInfo the reason is the default of the code's class; a code that gRPC does not have is UNKNOWN.
    `metadata` is added to what the ErrorInfo has.
    """
    info = error_details_pb2.ErrorInfo()
    bad = error_details_pb2.BadRequest()
    retry = error_details_pb2.RetryInfo()
    for detail in status.details:
        for read in (info, bad, retry):
            _unpack(detail, read)
    known = status.code in code_pb2.Code.values()
    code = code_pb2.Code.Name(status.code) if known else LuthierError.code
    return BY_CODE.get(code, LuthierError)(
        status.message or code,
        reason=info.reason or None,
        metadata={**metadata, **info.metadata},
        violations=map(_field_violation, bad.field_violations),
        retry_after_seconds=max(0.0, retry.retry_delay.ToNanoseconds() / 1e9)
        if retry.HasField("retry_delay")
        else None,
    )


def status_of_call(call: FailedCall) -> status_pb2.Status:
    """Return the Status that came with a call; where there is none, or a proxy mangled it, its code and message."""
    status = status_pb2.Status(message=call.details() or "")
    for key, value in call.trailing_metadata() or ():
        if key == DETAILS_KEY and isinstance(value, bytes):
            status = _parsed(value) or status
    number: int = call.code().value[0]
    status.code = number
    return status


def _parsed(packed: bytes) -> status_pb2.Status | None:
    try:
        return status_pb2.Status.FromString(packed)
    except DecodeError:
        return None


def _unpack(detail: any_pb2.Any, read: Message) -> None:
    try:
        detail.Unpack(read)
    except DecodeError:
        read.Clear()


def _field_violation(violation: error_details_pb2.BadRequest.FieldViolation) -> FieldViolation:
    given = {"reason": violation.reason} if violation.reason else {}
    return FieldViolation(field=violation.field, description=violation.description, **given)
