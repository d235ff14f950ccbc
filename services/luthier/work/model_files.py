"""Fetch a model's files from ModelService into a folder, each verified by its digest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import grpc

from luthier.storage.files import path_below
from luthier.v1 import model_pb2, model_service_pb2, model_service_pb2_grpc
from luthier.work.cache import BlobCache
from luthier.work.peers import bearer
from luthier.work.retry import retrying

_CALL_SECONDS = 600.0


def fetch_model(
    channel: grpc.Channel,
    token: str,
    name: str,
    cache: BlobCache,
    folder: Path,
    *,
    tokenizer_only: bool = False,
) -> Path:
    """Put the files of model `name` into `folder` and return it; files in the cache are not fetched again.

    Raises:
        LuthierError: the service refused, or was away for too long (Unavailable).
        DataLoss: a file arrived with another digest.
        InvalidArgument: PATH_NOT_ALLOWED; a file's path leaves the folder.
    """
    stub = model_service_pb2_grpc.ModelServiceStub(channel)
    request = model_service_pb2.ListModelFilesRequest(parent=name)
    listed = retrying(lambda: stub.ListModelFiles(request, metadata=bearer(token), timeout=30))
    for file in listed.files:
        if file.tokenizer or not tokenizer_only:
            # The whole taking is repeated: what breaks off in the middle leaves nothing behind.
            download = _download(stub, token, name, file)
            retrying(partial(cache.take, file.sha256, path_below(folder, file.path), download))
    return folder


def _download(
    stub: model_service_pb2_grpc.ModelServiceStub, token: str, name: str, file: model_pb2.ModelFile
) -> Callable[[], Iterator[bytes]]:
    request = model_service_pb2.DownloadModelFileRequest(name=name, path=file.path)

    def chunks() -> Iterator[bytes]:
        for response in stub.DownloadModelFile(request, metadata=bearer(token), timeout=_CALL_SECONDS):
            yield response.data

    return chunks
