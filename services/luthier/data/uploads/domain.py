"""Uploads as values, with the rules that they obey."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from enum import StrEnum

from luthier.errors import FailedPrecondition, FieldViolation, InvalidArgument, Reason

MAX_CHUNK_BYTES = 1 << 20
MAX_FILENAME_BYTES = 255
_SHA256 = re.compile(r"[0-9a-f]{64}")


class UploadState(StrEnum):
    """Where an upload stands. COMPLETE and CANCELLED are final."""

    RECEIVING = "RECEIVING"
    COMPLETE = "COMPLETE"
    CANCELLED = "CANCELLED"


@dataclass(frozen=True, slots=True, kw_only=True)
class Upload:
    """A file on its way in.

    `size_bytes` 0 and `sha256` empty: not announced. `persisted_size_bytes` is stored only when the
    upload is COMPLETE; while it is RECEIVING the staged bytes tell it. `digest` is the blob when COMPLETE.
    """

    name: str
    uid: str
    state: UploadState
    labels: Mapping[str, str]
    create_time: datetime
    update_time: datetime
    revision: int
    filename: str
    size_bytes: int = 0
    sha256: str = ""
    persisted_size_bytes: int = 0
    digest: str = ""

    def completed(self, digest: str, size_bytes: int) -> Upload:
        """Return the upload once all its bytes are stored."""
        self.require_receiving()
        return replace(self, state=UploadState.COMPLETE, digest=digest, persisted_size_bytes=size_bytes)

    def cancelled(self) -> Upload:
        """Return the upload once given up. Raises FailedPrecondition when it is complete."""
        if self.state is UploadState.COMPLETE:
            raise self._wrong_state("cancelled only while RECEIVING")
        return replace(self, state=UploadState.CANCELLED, persisted_size_bytes=0)

    def require_receiving(self) -> None:
        """Raise FailedPrecondition WRONG_STATE unless bytes may be written."""
        if self.state is not UploadState.RECEIVING:
            raise self._wrong_state("written only while RECEIVING")

    def require_complete(self) -> Upload:
        """Return the upload. Raises FailedPrecondition UPLOAD_INCOMPLETE unless all its bytes are here."""
        if self.state is UploadState.COMPLETE:
            return self
        raise FailedPrecondition(
            f"{self.name} must be COMPLETE, it is {self.state}; finish it with WriteUpload",
            reason=Reason.UPLOAD_INCOMPLETE,
            metadata={"name": self.name, "state": self.state},
        )

    def _wrong_state(self, rule: str) -> FailedPrecondition:
        return FailedPrecondition(
            f"{self.name} is {self.state}; an upload can be {rule}",
            metadata={"name": self.name, "state": self.state},
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Bytes to append at `offset`, with the CRC-32 that their sender computed; `finish`: the last ones."""

    offset: int
    data: bytes
    crc32: int
    finish: bool


def check_upload(filename: str, size_bytes: int, sha256: str, max_bytes: int) -> None:
    """Raise InvalidArgument naming every field of a new upload that is not valid."""
    violations = [
        *_filename_violations(filename),
        *_size_violations(size_bytes, max_bytes),
    ]
    if sha256 and not _SHA256.fullmatch(sha256):
        description = f"must be 64 lowercase hex digits, got {sha256!r}"
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


def check_chunk(upload: Upload, chunk: Chunk, persisted_size_bytes: int, max_bytes: int) -> None:
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


def _check_crc32(chunk: Chunk) -> None:
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


def _check_end(upload: Upload, chunk: Chunk, max_bytes: int) -> None:
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
