"""Errors to the wire: one `google.rpc.Status` in `grpc-status-details-bin`, with exactly one ErrorInfo (AIP-193)."""

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2

from luthier.errors import DOMAIN, LuthierError

DETAILS_KEY = "grpc-status-details-bin"

# gRPC refuses trailing metadata above 8 KiB at random and above 16 KiB always, and the caller then sees
# RESOURCE_EXHAUSTED instead of the error. The details travel in base64 (4,500 bytes become 6,000), the message
# percent-encoded beside them.
_STATUS_BYTES = 4500
_HEADER_BYTES = 1024
_MESSAGE_BYTES = 768
_METADATA_BYTES = 1536
_VALUE_BYTES = 256


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
    _pack(status, _error_info(error))
    if request_id:
        _pack(status, error_details_pb2.RequestInfo(request_id=_cut(request_id, _VALUE_BYTES)))
    if error.retry_after_seconds is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(round(error.retry_after_seconds * 1e9))
        _pack(status, error_details_pb2.RetryInfo(retry_delay=delay))
    if error.preconditions:
        _pack(status, _precondition_failure(error, _room(status) // 2))
    if error.violations:
        _pack(status, _bad_request(error, _room(status)))
    return status


def printable(message: str) -> str:
    """Return a message cut to what fits into the `grpc-message` header; the details have more of it."""
    size = 0
    for position, character in enumerate(message):
        plain = " " <= character <= "~" and character != "%"
        size += 1 if plain else 3 * len(character.encode(errors="replace"))
        if size > _HEADER_BYTES:
            return message[:position] + "…"
    return message


def to_trailer(error: LuthierError, request_id: str = "") -> tuple[str, bytes]:
    """Return the trailing metadata entry that carries an error's Status."""
    return DETAILS_KEY, to_status(error, request_id).SerializeToString()


def _error_info(error: LuthierError) -> error_details_pb2.ErrorInfo:
    info = error_details_pb2.ErrorInfo(reason=_cut(str(error.reason), 63), domain=DOMAIN)
    for key, value in error.metadata.items():
        name = _cut(key, 64)
        info.metadata[name] = _cut(value, _VALUE_BYTES)
        if info.ByteSize() > _METADATA_BYTES:
            del info.metadata[name]
            break
    return info


def _precondition_failure(error: LuthierError, room: int) -> error_details_pb2.PreconditionFailure:
    failure = error_details_pb2.PreconditionFailure()
    for condition in error.preconditions:
        failure.violations.add(
            type=_cut(condition.type, 64),
            subject=_cut(condition.subject, _VALUE_BYTES),
            description=_cut(condition.description, _VALUE_BYTES),
        )
        if failure.ByteSize() > room:
            del failure.violations[-1]
            break
    return failure


def _bad_request(error: LuthierError, room: int) -> error_details_pb2.BadRequest:
    bad = error_details_pb2.BadRequest()
    for violation in error.violations:
        bad.field_violations.add(
            field=_cut(violation.field, _VALUE_BYTES),
            description=_cut(violation.description, _VALUE_BYTES),
            reason=_cut(str(violation.reason), 63),
        )
        if bad.ByteSize() > room:
            del bad.field_violations[-1]
            break
    return bad


def _room(status: status_pb2.Status) -> int:
    # Less the name of the type and the lengths that packing adds.
    return _STATUS_BYTES - int(status.ByteSize()) - 80


def _pack(status: status_pb2.Status, detail: Message) -> None:
    packed = any_pb2.Any()
    packed.Pack(detail)
    status.details.append(packed)


def _cut(text: str, most_bytes: int) -> str:
    encoded = text.encode(errors="replace")
    if len(encoded) <= most_bytes:
        return text
    return encoded[: most_bytes - 3].decode(errors="ignore") + "…"
