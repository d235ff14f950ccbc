"""Errors to the wire: one `google.rpc.Status` in `grpc-status-details-bin`, with exactly one ErrorInfo (AIP-193)."""

import grpc
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from luthier.errors import Failure, LuthierError
from luthier.errors.status import DETAILS_KEY, failure_to_status

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

    Details: ErrorInfo always; BadRequest, RetryInfo where the error has them; RequestInfo with a request id. A
    message, a value or a list that is too long is cut short.
    """
    status = failure_to_status(_short(error))
    if request_id:
        _pack(status, error_details_pb2.RequestInfo(request_id=_cut(request_id, _VALUE_BYTES)))
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


def _short(error: LuthierError) -> Failure:
    metadata: dict[str, str] = {}
    room = _METADATA_BYTES
    for key, value in error.metadata.items():
        name, said = _cut(key, 64), _cut(value, _VALUE_BYTES)
        # Besides the two, an entry of a map has their lengths and tags.
        room -= len(name.encode()) + len(said.encode()) + 8
        if room < 0:
            break
        metadata[name] = said
    return Failure(
        code=error.code,
        reason=_cut(str(error.reason), 63),
        message=_cut(error.message, _MESSAGE_BYTES),
        metadata=metadata,
        retry_after_seconds=error.retry_after_seconds,
    )


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
    status.details.add().Pack(detail)


def _cut(text: str, most_bytes: int) -> str:
    encoded = text.encode(errors="replace")
    if len(encoded) <= most_bytes:
        return text
    return encoded[: most_bytes - 3].decode(errors="ignore") + "…"
