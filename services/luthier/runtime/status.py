"""Errors to the wire: one `google.rpc.Status` in `grpc-status-details-bin`, with exactly one ErrorInfo (AIP-193)."""

from collections.abc import Iterator

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2

from luthier.errors import DOMAIN, LuthierError

DETAILS_KEY = "grpc-status-details-bin"

# gRPC refuses headers above 8 KiB at random and above 16 KiB always; the details travel in base64 and every
# non-ASCII byte of the message as three.
_MESSAGE_BYTES = 768
_DETAILS_BYTES = 3584
_METADATA_BYTES = 256


def to_code(error: LuthierError) -> grpc.StatusCode:
    """Return the status code of an error's class."""
    return grpc.StatusCode[error.code]


def to_status(error: LuthierError, request_id: str = "") -> status_pb2.Status:
    """Return an error as a Status of at most a few kilobytes.

    Details: ErrorInfo always; BadRequest, PreconditionFailure, RetryInfo where the error has them; RequestInfo
    with a request id. A message, a value or a list that is too long is cut short.
    """
    status = status_pb2.Status(
        code=code_pb2.Code.Value(error.code), message=_cut(error.message, _MESSAGE_BYTES)
    )
    for detail in _details(error, request_id):
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status


def to_trailer(error: LuthierError, request_id: str = "") -> tuple[str, bytes]:
    """Return the trailing metadata entry that carries an error's Status."""
    return DETAILS_KEY, to_status(error, request_id).SerializeToString()


def _details(error: LuthierError, request_id: str) -> Iterator[Message]:
    metadata = {key: _cut(value, _METADATA_BYTES) for key, value in list(error.metadata.items())[:8]}
    info = error_details_pb2.ErrorInfo(reason=str(error.reason), domain=DOMAIN, metadata=metadata)
    yield info
    if request_id:
        yield error_details_pb2.RequestInfo(request_id=request_id)
    if error.retry_after_seconds is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(round(error.retry_after_seconds * 1e9))
        yield error_details_pb2.RetryInfo(retry_delay=delay)
    room = _DETAILS_BYTES - info.ByteSize()
    if error.preconditions:
        failure = error_details_pb2.PreconditionFailure()
        for condition in error.preconditions:
            failure.violations.add(
                type=condition.type,
                subject=condition.subject,
                description=_cut(condition.description, _METADATA_BYTES),
            )
            if failure.ByteSize() > room // 2:
                break
        yield failure
        room -= failure.ByteSize()
    if error.violations:
        bad = error_details_pb2.BadRequest()
        for violation in error.violations:
            bad.field_violations.add(
                field=_cut(violation.field, _METADATA_BYTES),
                description=_cut(violation.description, _METADATA_BYTES),
                reason=str(violation.reason),
            )
            if bad.ByteSize() > room - 2 * _METADATA_BYTES:
                break
        yield bad


def _cut(text: str, most_bytes: int) -> str:
    encoded = text.encode(errors="replace")
    if len(encoded) <= most_bytes:
        return text
    return encoded[: most_bytes - 3].decode(errors="ignore") + "…"
