"""What uploads and their chunks may be, and which state follows which."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Mapping, Sequence

from luthier.errors import FieldViolation, InvalidArgument, Reason
from luthier.v1.data_service_pb2 import WriteUploadRequest
from luthier.v1.upload_pb2 import Upload

MAX_CHUNK_BYTES = 1 << 20
MAX_FILENAME_BYTES = 255
_SHA256 = re.compile(r"[0-9a-f]{64}")

State = Upload.State
TRANSITIONS: Mapping[int, Sequence[int]] = {
    State.STATE_RECEIVING: (State.STATE_COMPLETE, State.STATE_CANCELLED),
    State.STATE_COMPLETE: (),
    State.STATE_CANCELLED: (),
}


def check_upload(upload: Upload, max_bytes: int) -> None:
    """Raise InvalidArgument naming every field of a new upload that is not valid."""
    violations = [
        *_filename_violations(upload.filename),
        *_size_violations(upload.size_bytes, max_bytes),
    ]
    if upload.sha256 and not _SHA256.fullmatch(upload.sha256):
        description = f"must be 64 lowercase hex digits, got {upload.sha256!r}"
        violations.append(FieldViolation(field="upload.sha256", description=description))
    if violations:
        raise InvalidArgument.of_fields(*violations)


def _filename_violations(filename: str) -> Iterator[FieldViolation]:
    path = "upload.filename"
    if not filename:
        description = "must be the name of the file, got nothing"
        yield FieldViolation(field=path, description=description, reason=Reason.FIELD_REQUIRED)
    elif len(filename.encode()) > MAX_FILENAME_BYTES:
        description = f"must be at most {MAX_FILENAME_BYTES} bytes, got {len(filename.encode())}"
        yield FieldViolation(field=path, description=description)
    elif filename in (".", "..") or any(
        character in "/\\" or not character.isprintable() for character in filename
    ):
        description = f"must be a name without folders and control characters, got {filename!r}"
        yield FieldViolation(field=path, description=description)


def _size_violations(size_bytes: int, max_bytes: int) -> Iterator[FieldViolation]:
    if not 0 <= size_bytes <= max_bytes:
        yield FieldViolation(
            field="upload.size_bytes", description=f"must be in 0..{max_bytes}, got {size_bytes}"
        )


def check_chunk(upload: Upload, chunk: WriteUploadRequest, persisted_size_bytes: int, max_bytes: int) -> None:
    """Raise InvalidArgument unless the chunk is whole and continues the upload.

    CHECKSUM_MISMATCH: its bytes changed on the way. OFFSET_MISMATCH: it begins elsewhere than the persisted
    bytes end. INVALID_FIELD: it is over `MAX_CHUNK_BYTES`, or goes beyond the size announced or allowed.
    UPLOAD_INCOMPLETE: it finishes the upload before the announced size.
    """
    if len(chunk.data) > MAX_CHUNK_BYTES:
        description = f"must be at most {MAX_CHUNK_BYTES} bytes, got {len(chunk.data)}"
        raise InvalidArgument.of_fields(FieldViolation(field="data", description=description))
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
