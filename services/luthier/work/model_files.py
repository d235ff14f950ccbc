"""Fetch a model's files from ModelService into a folder, each verified by its digest."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import grpc

from luthier.v1 import model_pb2, model_service_pb2, model_service_pb2_grpc
from luthier.work.cache import BlobCache
from luthier.work.file_paths import within
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
        DataLoss: a file arrived with another digest, or its path leads out of the folder (PATH_NOT_ALLOWED).
    """
    stub = model_service_pb2_grpc.ModelServiceStub(channel)
    request = model_service_pb2.ListModelFilesRequest(parent=name)
    listed = retrying(lambda: stub.ListModelFiles(request, metadata=bearer(token), timeout=30))
    for file in listed.files:
        if file.tokenizer or not tokenizer_only:
            cached = cache.find(file.sha256)
            if cached is None:
                cached = retrying(lambda file=file: _download(stub, token, name, file, cache))  # type: ignore[misc]
            place(cached, within(folder, file.path))
    return folder


def place(source: Path, target: Path) -> None:
    """Make a cached file appear at `target`, without copying where the file system allows."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except FileExistsError:
        return
    except OSError:
        shutil.copyfile(source, target)


def _download(
    stub: model_service_pb2_grpc.ModelServiceStub,
    token: str,
    name: str,
    file: model_pb2.ModelFile,
    cache: BlobCache,
) -> Path:
    request = model_service_pb2.DownloadModelFileRequest(name=name, path=file.path)

    def chunks() -> Iterator[bytes]:
        for response in stub.DownloadModelFile(request, metadata=bearer(token), timeout=_CALL_SECONDS):
            yield response.data

    return cache.add(file.sha256, chunks())
