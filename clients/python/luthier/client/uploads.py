"""Uploading a file so that it arrives whole, over any number of breaks."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Iterator
from pathlib import Path

from luthier.client import names
from luthier.client.flows import Scope, call
from luthier.client.retry import is_retryable
from luthier.client.transfers import ProgressCallback, TransferProgress
from luthier.errors import (
    DataLoss,
    DeadlineExceeded,
    FailedPrecondition,
    FieldViolation,
    InvalidArgument,
    LuthierError,
    Reason,
)
from luthier.v1.data_service_pb2 import GetUploadRequest, StartUploadRequest, WriteUploadRequest
from luthier.v1.upload_pb2 import Upload

CHUNK_BYTES = 1024 * 1024
_SLOWEST_BYTES_PER_SECOND = 64 * 1024


async def upload(
    scope: Scope,
    path: str | os.PathLike[str],
    *,
    filename: str = "",
    resume: str = "",
    progress: ProgressCallback | None = None,
) -> Upload:
    """Send a file in chunks of 1 MiB, each with its CRC-32, the whole with its sha256.

    Returns the complete upload.

    A break is resumed at the last byte that the service has stored. `resume` takes up an upload by name that
    another process began. `filename` is what error messages call the file (default: its own name). `progress`
    may be called from a thread.

    Raises:
        FileNotFoundError: There is no such file.
        InvalidArgument: `resume` names an upload of other bytes.
    """
    source = Path(path)
    size, digest = await scope.driver.work(lambda: _measure(source))
    if resume:
        request = GetUploadRequest(name=names.child(scope.project, "uploads", resume))
        taken = await call(scope, lambda stubs: stubs.data.GetUpload, request)
        _check_same_bytes(taken, source, size, digest)
    else:
        wanted = Upload(filename=filename or source.name, size_bytes=size, sha256=digest)
        start = StartUploadRequest(parent=names.project(scope.project), upload=wanted)
        taken = await call(scope, lambda stubs: stubs.data.StartUpload, start)
    return await _write(scope, source, size, taken, progress)


async def _write(
    scope: Scope, source: Path, size: int, taken: Upload, progress: ProgressCallback | None
) -> Upload:
    backoff = scope.backoff()
    stored = taken.persisted_size_bytes
    while taken.state == Upload.STATE_RECEIVING:
        if progress is not None:
            progress(TransferProgress(name=taken.name, completed_bytes=stored, total_bytes=size))
        chunks = _chunks(source, taken, size, progress)
        timeout = scope.timeout_seconds + (size - stored) / _SLOWEST_BYTES_PER_SECOND
        try:
            taken = await scope.driver.send(lambda stubs: stubs.data.WriteUpload, chunks, timeout)
            continue
        except LuthierError as error:
            if not _may_write_again(error):
                raise
            broken = error
        request = GetUploadRequest(name=taken.name)
        taken = await call(scope, lambda stubs: stubs.data.GetUpload, request)
        if taken.state != Upload.STATE_RECEIVING:
            break
        if taken.persisted_size_bytes > stored:
            backoff.progressed()
        stored = taken.persisted_size_bytes
        await scope.driver.sleep(backoff.delay_after(broken))
    if taken.state != Upload.STATE_COMPLETE:
        raise FailedPrecondition(
            f"{taken.name} was cancelled; start a new upload", metadata={"name": taken.name}
        )
    if progress is not None:
        progress(TransferProgress(name=taken.name, completed_bytes=size, total_bytes=size))
    return taken


def _may_write_again(error: LuthierError) -> bool:
    """Whether the service may know better than we what it has.

    It went away, was slow, had more, or had all.
    """
    if isinstance(error, DeadlineExceeded | FailedPrecondition) or is_retryable(error):
        return True
    return error.reason == Reason.OFFSET_MISMATCH


def _measure(source: Path) -> tuple[int, str]:
    with source.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return file.tell(), digest.hexdigest()


def _check_same_bytes(taken: Upload, source: Path, size: int, digest: str) -> None:
    if (
        (taken.size_bytes in (0, size))
        and taken.sha256 in ("", digest)
        and taken.persisted_size_bytes <= size
    ):
        return
    description = (
        f"must be the upload of {source} ({size} bytes, sha256 {digest}), got {taken.name}"
        f" of {taken.filename} ({taken.size_bytes} bytes, sha256 {taken.sha256 or 'not said'})"
    )
    raise InvalidArgument.of_fields(FieldViolation(field="resume", description=description))


def _chunks(
    source: Path, taken: Upload, size: int, progress: ProgressCallback | None
) -> Iterator[WriteUploadRequest]:
    offset = taken.persisted_size_bytes
    name = taken.name
    with source.open("rb") as file:
        file.seek(offset)
        while True:
            data = file.read(min(CHUNK_BYTES, size - offset))
            finish = offset + len(data) >= size
            if not data and not finish:
                raise DataLoss(f"{source} was cut to {offset} bytes while it was being sent, expected {size}")
            yield WriteUploadRequest(
                name=name, offset=offset, data=data, crc32=zlib.crc32(data), finish=finish
            )
            if finish:
                return
            name = ""
            offset += len(data)
            if progress is not None:
                progress(TransferProgress(name=taken.name, completed_bytes=offset, total_bytes=size))
