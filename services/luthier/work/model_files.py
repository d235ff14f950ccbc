"""Fetch a model's files from ModelService into a folder: those that were pinned, each verified by its digest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import grpc

from luthier.errors import DataLoss, Reason
from luthier.runtime.digests import files_digest
from luthier.storage.files import path_below
from luthier.v1 import model_pb2, model_service_pb2, model_service_pb2_grpc
from luthier.work.cache import BlobCache
from luthier.work.limited import Check
from luthier.work.peers import bearer
from luthier.work.pinned import require_pinned
from luthier.work.retry import Messages, Token, asked, streamed
from luthier.worker.v1 import task_pb2

_CALL_SECONDS = 30.0
_STREAM_SECONDS = 600.0


def fetch_model(
    channel: grpc.Channel,
    token: Token,
    reference: task_pb2.ModelReference,
    cache: BlobCache,
    folder: Path,
    check: Check = lambda: None,
    *,
    tokenizer_only: bool = False,
) -> Path:
    """Put a model's files into `folder` and return it; files in the cache are not fetched again.

    A download that breaks off goes on where it stopped, with a fresh token. `check` is called several times a second,
    whatever the service does; what it raises ends the fetching.

    Raises:
        LuthierError: the service refused, or was away for too long (Unavailable).
        DataLoss: the reference has no digest, the name means another model by now, or a file arrived with another
            digest.
        InvalidArgument: PATH_NOT_ALLOWED; a file's path leaves the folder.
    """
    stub = model_service_pb2_grpc.ModelServiceStub(channel)
    for file in list_model(channel, token, reference, check):
        if file.tokenizer or not tokenizer_only:
            download = _download(stub, token, reference.name, file, check)
            cache.take(file.sha256, path_below(folder, file.path), download)
    return folder


def list_model(
    channel: grpc.Channel, token: Token, reference: task_pb2.ModelReference, check: Check = lambda: None
) -> list[model_pb2.ModelFile]:
    """Return the files that a model was pinned with. `check` as in `fetch_model`.

    Raises:
        LuthierError: the service refused, or was away for too long (Unavailable).
        DataLoss: the reference has no digest, or the name means another model by now.
    """
    if not reference.digest:
        raise DataLoss(f"{reference.name} has no digest", reason=Reason.DATA_CORRUPTED)
    stub = model_service_pb2_grpc.ModelServiceStub(channel)
    files = list(_listed(stub, token, reference.name, check))
    found = files_digest({file.path: file.sha256 for file in files})
    require_pinned(reference.name, reference.digest, found)
    return files


def _listed(
    stub: model_service_pb2_grpc.ModelServiceStub, token: Token, name: str, check: Check
) -> Iterator[model_pb2.ModelFile]:
    request = model_service_pb2.ListModelFilesRequest(parent=name)
    while True:
        page = asked(
            lambda: stub.ListModelFiles.future(request, metadata=bearer(token()), timeout=_CALL_SECONDS),
            check,
        )
        yield from page.files
        if not page.next_page_token:
            return
        request.page_token = page.next_page_token


def _download(
    stub: model_service_pb2_grpc.ModelServiceStub,
    token: Token,
    name: str,
    file: model_pb2.ModelFile,
    check: Check,
) -> Callable[[], Iterator[bytes]]:
    def chunks() -> Iterator[bytes]:
        received = 0

        def begin() -> Messages[model_service_pb2.DownloadModelFileResponse]:
            request = model_service_pb2.DownloadModelFileRequest(
                name=name, path=file.path, start_offset=received
            )
            call: Messages[model_service_pb2.DownloadModelFileResponse] = stub.DownloadModelFile(
                request, metadata=bearer(token()), timeout=_STREAM_SECONDS
            )
            return call

        for response in streamed(begin, check):
            received += len(response.data)
            yield response.data

    return chunks
