"""What uploads and their chunks may be, and which state follows which."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

from luthier.errors import FieldViolation, InvalidArgument, Reason
from luthier.runtime.field_limits import (
    DIGEST,
    Limit,
    LimitTable,
    limit_violations,
    num_bytes,
    refuse,
    required,
    whole,
)
from luthier.v1.data_service_pb2 import WriteUploadRequest
from luthier.v1.upload_pb2 import Upload

MAX_CHUNK_BYTES = 1 << 20
MAX_FILENAME_BYTES = 255
_PLAIN_NAME = Limit(
    rule="must be a name without folders and control characters",
    allows=lambda name: name not in (".", "..") and name.isprintable() and not set("/\\") & set(name),
)
UPLOAD_LIMITS: LimitTable = {
    "filename": (required("must be the name of the file"), num_bytes(MAX_FILENAME_BYTES), _PLAIN_NAME),
    "sha256": DIGEST,
}
CHUNK_LIMITS: LimitTable = {"data": num_bytes(MAX_CHUNK_BYTES)}

State = Upload.State
TRANSITIONS: Mapping[int, Sequence[int]] = {
    State.STATE_RECEIVING: (State.STATE_COMPLETE, State.STATE_CANCELLED),
    State.STATE_COMPLETE: (),
    State.STATE_CANCELLED: (),
}


def check_upload(upload: Upload, max_bytes: int) -> None:
    """Raise InvalidArgument naming every field of a new upload that is not valid."""
    refuse(limit_violations(upload, {**UPLOAD_LIMITS, "size_bytes": whole(0, max_bytes)}, "upload"))


def check_chunk(upload: Upload, chunk: WriteUploadRequest, persisted_size_bytes: int, max_bytes: int) -> None:
    """Raise InvalidArgument unless the chunk is whole and continues the upload.

    CHECKSUM_MISMATCH: its bytes changed on the way. OFFSET_MISMATCH: it begins elsewhere than the persisted
    bytes end. INVALID_FIELD: it is over `MAX_CHUNK_BYTES`, or goes beyond the size announced or allowed.
    UPLOAD_INCOMPLETE: it finishes the upload before the announced size.
    """
    refuse(limit_violations(chunk, CHUNK_LIMITS))
    _check_crc32(chunk)
    if chunk.offset != persisted_size_bytes:
        raise InvalidArgument.of_fields(
            FieldViolation(
                field="offset",
                description=f"must be {persisted_size_bytes}, the persisted size of {upload.name}, "
                f"got {chunk.offset}",
                reason=Reason.OFFSET_MISMATCH,
            )
        )
    _check_end(upload, chunk, max_bytes)


def _check_crc32(chunk: WriteUploadRequest) -> None:
    actual = zlib.crc32(chunk.data)
    if actual != chunk.crc32:
        raise InvalidArgument.of_fields(
            FieldViolation(
                field="crc32",
                description=f"must be the CRC-32 of data, {actual:#010x}, got {chunk.crc32:#010x}; "
                f"send the chunk at offset {chunk.offset} again",
                reason=Reason.CHECKSUM_MISMATCH,
            )
        )


def _check_end(upload: Upload, chunk: WriteUploadRequest, max_bytes: int) -> None:
    end = chunk.offset + len(chunk.data)
    limit = upload.size_bytes or max_bytes
    if end > limit:
        whose = "the announced size" if upload.size_bytes else "the limit"
        description = (
            f"must end at {limit}, {whose}, or before, got {len(chunk.data)} bytes at offset {chunk.offset}"
        )
        raise InvalidArgument.of_fields(FieldViolation(field="data", description=description))
    if chunk.finish and upload.size_bytes and end < upload.size_bytes:
        description = f"must come with byte {upload.size_bytes}, the announced size, got it at byte {end}"
        violation = FieldViolation(field="finish", description=description, reason=Reason.UPLOAD_INCOMPLETE)
        raise InvalidArgument.of_fields(violation)
