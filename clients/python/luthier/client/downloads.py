"""Downloading a model so that its folder appears whole or not at all."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from luthier.client import adapter_base, model_card, names
from luthier.client.flows import ResumedStream, Scope, call, pages, replaced
from luthier.client.transfers import ProgressCallback, TransferProgress
from luthier.errors import AlreadyExists, DataLoss, NotFound, Reason
from luthier.v1.model_pb2 import Model, ModelFile
from luthier.v1.model_service_pb2 import (
    DownloadModelFileRequest,
    DownloadModelFileResponse,
    GetModelRequest,
    ListModelFilesRequest,
)


async def download(
    scope: Scope,
    model: str,
    directory: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    progress: ProgressCallback | None = None,
) -> Path:
    """Bring the files of a READY model into `directory`, which appears whole or not at all, and return it.

    A model that was tuned, merged or exported comes with a model card, `README.md`: what it was made from, its data and
    scores, as the services know them now.

    An adapter's `adapter_config.json` names its base model as `from_pretrained` takes it, so that PEFT's
    `AutoPeftModelForCausalLM` loads the folder: `base`, a folder or a Hub id; without it the Hub id and commit that the
    base was registered from, and where it was not from the Hub its name here, which PEFT does not find:
    `luthier.client.adapter_base.unplaced` tells. Bring that model too then, and give its folder as `base`.

    The bytes come into `<directory>.partial` first; a download that was broken off goes on there, also in
    another process. Each file is checked against its sha256. A directory that holds these files already is
    left as it is. All files are those of the model that has the name at the beginning.

    Raises:
        AlreadyExists: The directory holds something else. DataLoss: A file has other bytes than its sha256
        says, also when fetched anew, or a path that leaves the directory. NotFound: RESOURCE_REPLACED; the model was
        deleted meanwhile, and its name is another one's.
    """
    name = names.weights(scope.project, model)
    target = Path(directory)
    found = await call(scope, lambda stubs: stubs.models.GetModel, GetModelRequest(name=name))
    listing = pages(
        scope,
        lambda stubs: stubs.models.ListModelFiles,
        ListModelFilesRequest(parent=name),
        lambda p: p.files,
    )
    files = [file async for file in listing]
    for file in files:
        _check_path(file.path)
    texts = await _texts(scope, found, files, os.fspath(base) if base is not None else "")
    if await scope.driver.work(lambda: _holds_already(target, files, name, texts)):
        return target
    staging = target.with_name(target.name + ".partial")
    for file in (one for one in files if one.path not in texts):
        wanted = DownloadModelFileRequest(name=name, uid=found.uid, path=file.path)
        await _fetch(scope, wanted, file, staging, progress)
    card = model_card.written(await model_card.find(scope, found)) if model_card.has_card(found) else ""
    texts |= {model_card.CARD: card.encode()} if card and not _has_card(files) else {}
    await scope.driver.work(lambda: _move_into_place(staging, target, files, texts))
    return target


async def _texts(scope: Scope, model: Model, files: Sequence[ModelFile], base: str) -> dict[str, bytes]:
    """Return by their paths the files of a model that are written otherwise than they are stored."""
    config = next((one for one in files if one.path == adapter_base.CONFIG), None)
    if config is None or not model.base_model:
        return {}
    place, revision = base, ""
    if not place:
        wanted = GetModelRequest(name=model.base_model)
        # It may be gone: the adapter is whole without it.
        with suppress(NotFound):
            place, revision = adapter_base.place_of(
                await call(scope, lambda stubs: stubs.models.GetModel, wanted)
            )
    if not place:
        return {}
    stored = await _read(
        scope, DownloadModelFileRequest(name=model.name, uid=model.uid, path=config.path), config
    )
    return {config.path: adapter_base.based(stored, place, revision)}


async def _read(scope: Scope, wanted: DownloadModelFileRequest, file: ModelFile) -> bytes:
    """Return the bytes of a small file. Raises DataLoss where they are not what the model states."""
    data = bytearray()
    stream = ResumedStream(
        scope,
        lambda stubs: stubs.models.DownloadModelFile,
        lambda: replaced(wanted, start_offset=len(data)),
    )
    try:
        while len(data) < file.size_bytes and (piece := await stream.receive()) is not None:
            data += piece.data
    finally:
        stream.close()
    if hashlib.sha256(data).hexdigest() != file.sha256:
        raise _damaged(wanted.name, file)
    return bytes(data)


def _has_card(files: Sequence[ModelFile]) -> bool:
    return any(file.path == model_card.CARD for file in files)


async def _fetch(
    scope: Scope,
    wanted: DownloadModelFileRequest,
    file: ModelFile,
    staging: Path,
    progress: ProgressCallback | None,
) -> None:
    name = wanted.name
    final = staging / file.path
    part = final.with_name(f"{final.name}.{file.sha256[:12]}.part")
    if await scope.driver.work(lambda: _is_file(final, file)):
        return
    for is_last in (False, True):
        await _receive(scope, wanted, file, part, progress)
        if await scope.driver.work(lambda: _is_file(part, file)):
            await scope.driver.work(lambda: os.replace(part, final))
            return
        # The bytes that an earlier process left may have been damaged: once more from the beginning.
        part.unlink()
        if is_last:
            raise _damaged(name, file)


def _damaged(name: str, file: ModelFile) -> DataLoss:
    return DataLoss(
        f"{file.path} of {name} does not have the sha256 {file.sha256} that its model states",
        reason=Reason.CHECKSUM_MISMATCH,
        metadata={"model": name, "path": file.path},
    )


async def _receive(
    scope: Scope,
    wanted: DownloadModelFileRequest,
    file: ModelFile,
    part: Path,
    progress: ProgressCallback | None,
) -> None:
    """Append to `part` what is missing of the file."""
    part.parent.mkdir(parents=True, exist_ok=True)
    with part.open("ab") as out:
        if out.tell() > file.size_bytes:
            out.truncate(0)
        stream = ResumedStream(
            scope,
            lambda stubs: stubs.models.DownloadModelFile,
            lambda: replaced(wanted, start_offset=out.tell()),
        )
        try:
            while out.tell() < file.size_bytes and (piece := await stream.receive()) is not None:
                _append(out, piece, wanted.name, file, progress)
        finally:
            stream.close()
        out.flush()
        await scope.driver.work(lambda: os.fsync(out.fileno()))


def _append(
    out: BinaryIO,
    piece: DownloadModelFileResponse,
    name: str,
    file: ModelFile,
    progress: ProgressCallback | None,
) -> None:
    if piece.offset != out.tell():
        raise DataLoss(f"{file.path} of {name}: expected byte {out.tell()} next, got {piece.offset}")
    out.write(piece.data)
    if progress is not None:
        progress(TransferProgress(name=file.path, completed_bytes=out.tell(), total_bytes=file.size_bytes))


def _check_path(path: str) -> None:
    """Refuse what would be written outside the directory."""
    pure = PurePosixPath(path)
    if not path or pure.is_absolute() or ".." in pure.parts or "\\" in path:
        raise DataLoss(
            f"the service names a file outside the model's folder: {path!r}", reason=Reason.PATH_NOT_ALLOWED
        )


def _is_file(path: Path, file: ModelFile) -> bool:
    if not path.is_file() or path.stat().st_size != file.size_bytes:
        return False
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest() == file.sha256


def _holds_already(target: Path, files: Sequence[ModelFile], name: str, texts: Mapping[str, bytes]) -> bool:
    """Whether the target is the model, with these texts. False also when it is empty or not there."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return False
    present = {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()}
    if present - {model_card.CARD} == {file.path for file in files} - {model_card.CARD} and all(
        (target / file.path).read_bytes() == texts[file.path]
        if file.path in texts
        else _is_file(target / file.path, file)
        for file in files
    ):
        return True
    raise AlreadyExists(
        f"{target} is there and is not {name}; give a new or an empty directory",
        metadata={"path": str(target)},
    )


def _move_into_place(
    staging: Path, target: Path, files: Sequence[ModelFile], texts: Mapping[str, bytes]
) -> None:
    wanted = {staging / file.path for file in files}
    for path in [path for path in staging.rglob("*") if path.is_file() and path not in wanted]:
        path.unlink()
    staging.mkdir(parents=True, exist_ok=True)
    for written, text in texts.items():
        (staging / written).write_bytes(text)
    if target.exists():
        target.rmdir()
    shutil.move(staging, target)
