"""Fetch a model's files from ModelService into a folder, each verified by its digest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import grpc

from luthier.storage.files import path_below
from luthier.v1 import model_pb2, model_service_pb2, model_service_pb2_grpc
from luthier.work.cache import BlobCache
from luthier.work.limited import Check
from luthier.work.peers import bearer
from luthier.work.retry import Messages, Token, asked, streamed

_CALL_SECONDS = 30.0
_STREAM_SECONDS = 600.0


def fetch_model(
    channel: grpc.Channel,
    token: Token,
    name: str,
    cache: BlobCache,
    folder: Path,
    check: Check = lambda: None,
    *,
    tokenizer_only: bool = False,
) -> Path:
    """Put the files of model `name` into `folder` and return it; files in the cache are not fetched again.

    A download that breaks off goes on where it stopped, with a fresh token. `check` is called several times a second,
    whatever the service does; what it raises ends the fetching.

    Raises:
        LuthierError: the service refused, or was away for too long (Unavailable).
        DataLoss: a file arrived with another digest.
        InvalidArgument: PATH_NOT_ALLOWED; a file's path leaves the folder.
    """
    stub = model_service_pb2_grpc.ModelServiceStub(channel)
    request = model_service_pb2.ListModelFilesRequest(parent=name)
    listed = asked(
        lambda: stub.ListModelFiles.future(request, metadata=bearer(token()), timeout=_CALL_SECONDS), check
    )
    for file in listed.files:
        if file.tokenizer or not tokenizer_only:
            download = _download(stub, token, name, file, check)
            cache.take(file.sha256, path_below(folder, file.path), download)
    return folder


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
