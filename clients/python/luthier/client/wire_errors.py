"""From what gRPC raises to the error tree of `luthier.errors`, and from stored statuses to failures.

`google.rpc.Status` comes in the trailing metadata `grpc-status-details-bin`; it is read here without the
package grpcio-status.
"""

from collections.abc import Iterable
from typing import Protocol, cast

import grpc
from google.protobuf import any_pb2
from google.protobuf.message import DecodeError, Message
from google.rpc import code_pb2, error_details_pb2, status_pb2

from luthier.errors import (
    BY_CODE,
    Failure,
    FieldViolation,
    LuthierError,
    PreconditionViolation,
)

_DETAILS_KEY = "grpc-status-details-bin"
_REQUEST_ID_KEY = "x-request-id"


class _FailedCall(Protocol):
    def code(self) -> grpc.StatusCode: ...
    def details(self) -> str | None: ...
    def trailing_metadata(self) -> Iterable[tuple[str, str | bytes]] | None: ...


def from_rpc_error(error: grpc.RpcError) -> LuthierError:
    """Return the error that the service raised, or that gRPC raised in its stead.

    A status without details, as gRPC itself and proxies send, becomes the class of its code with that class's
    default reason.
    """
    call = cast(_FailedCall, error)
    trailing = dict(call.trailing_metadata() or ())
    status = status_pb2.Status(message=call.details() or "")
    packed = trailing.get(_DETAILS_KEY)
    if isinstance(packed, bytes):
        status = _parse_status(packed) or status
    code = call.code().name
    message = status.message
    if code == "UNAVAILABLE" and not status.details:
        message = f"the service cannot be reached: {message}"
    request_id = trailing.get(_REQUEST_ID_KEY)
    return _to_error(code, message, status, request_id if isinstance(request_id, str) else None)


def failure_of(status: status_pb2.Status) -> Failure:
    """Return why a resource failed, from the `error` field of the resource."""
    code = code_pb2.Code.Name(status.code) if status.code in code_pb2.Code.values() else "UNKNOWN"
    return Failure.of(_to_error(code, status.message, status, None))


def _parse_status(packed: bytes) -> status_pb2.Status | None:
    try:
        return status_pb2.Status.FromString(packed)
    except DecodeError:
        # A proxy may have mangled the trailer; code and message of the call itself remain.
        return None


def _to_error(code: str, message: str, status: status_pb2.Status, request_id: str | None) -> LuthierError:
    info = error_details_pb2.ErrorInfo()
    bad = error_details_pb2.BadRequest()
    preconditions = error_details_pb2.PreconditionFailure()
    retry = error_details_pb2.RetryInfo()
    for detail in status.details:
        for read in (info, bad, preconditions, retry):
            _unpack(detail, read)
    metadata = dict(info.metadata)
    if request_id:
        metadata.setdefault("request_id", request_id)
    kind = BY_CODE.get(code, LuthierError)
    return kind(
        message or code,
        reason=info.reason or None,
        metadata=metadata,
        violations=[_field_violation(violation) for violation in bad.field_violations],
        preconditions=[
            PreconditionViolation(
                type=violation.type, subject=violation.subject, description=violation.description
            )
            for violation in preconditions.violations
        ],
        retry_after_seconds=max(0.0, retry.retry_delay.ToNanoseconds() / 1e9)
        if retry.HasField("retry_delay")
        else None,
    )


def _unpack(detail: any_pb2.Any, read: Message) -> None:
    """Read a detail if it is of the kind of `read`; what a proxy has mangled is as if it had not been sent."""
    try:
        detail.Unpack(read)
    except DecodeError:
        read.Clear()


def _field_violation(violation: error_details_pb2.BadRequest.FieldViolation) -> FieldViolation:
    if violation.reason:
        return FieldViolation(
            field=violation.field, description=violation.description, reason=violation.reason
        )
    return FieldViolation(field=violation.field, description=violation.description)
