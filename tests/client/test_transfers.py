"""Uploads and downloads that are broken off, on both stacks."""

import hashlib
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from tests.client.conftest import UID

from luthier.client import AsyncClient, Client, TransferProgress
from luthier.errors import AlreadyExists, DataLoss, FailedPrecondition, InvalidArgument
from luthier.v1.model_pb2 import HubSource, Model, ModelFile
from luthier.v1.model_service_pb2 import DownloadModelFileResponse, ListModelFilesResponse
from luthier.v1.upload_pb2 import Upload

CONTENT = bytes(range(256)) * 4096 * 3 + b"the end"  # 3 MiB and a little
NAME = "projects/default/uploads/u"


class UploadStore:
    """The upload half of a data service, which can break off after a number of stored chunks."""

    def __init__(self, services: Any, *, break_after: tuple[int, ...] = ()) -> None:
        self.services = services
        self.break_after = list(break_after)
        self.stored = bytearray()
        self.upload = Upload(name=NAME)
        self.starts: list[int] = []
        services.answers.update(
            StartUpload=self.start, GetUpload=lambda request, context: self.now(), WriteUpload=self.write
        )

    def now(self) -> Upload:
        self.upload.persisted_size_bytes = len(self.stored)
        return self.upload

    def start(self, request: Any, context: grpc.ServicerContext) -> Upload:
        self.upload.CopyFrom(request.upload)
        self.upload.name = NAME
        self.upload.state = Upload.STATE_RECEIVING
        return self.upload

    def write(self, requests: Iterator[Any], context: grpc.ServicerContext) -> Upload:
        limit = self.break_after.pop(0) if self.break_after else None
        for number, request in enumerate(requests):
            if number == 0:
                assert request.name == NAME
                self.starts.append(request.offset)
            assert len(request.data) <= 1024 * 1024
            assert request.crc32 == zlib.crc32(request.data)
            assert request.offset == len(self.stored)
            if number == limit:
                self.services.refuse(context, grpc.StatusCode.UNAVAILABLE, "away", reason="SHUTTING_DOWN")
            self.stored += request.data
            if request.finish:
                assert hashlib.sha256(self.stored).hexdigest() == self.upload.sha256
                self.upload.state = Upload.STATE_COMPLETE
        return self.now()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "examples.jsonl"
    path.write_bytes(CONTENT)
    return path


def test_upload_resumes_at_the_persisted_size(services: Any, client: Client, source: Path) -> None:
    store = UploadStore(services, break_after=(2, 0, 1))
    seen: list[TransferProgress] = []
    done = client.datasets.upload(source, progress=seen.append)
    assert done.state == Upload.STATE_COMPLETE
    assert done.filename == "examples.jsonl"
    assert done.size_bytes == len(CONTENT)
    assert bytes(store.stored) == CONTENT
    mebibyte = 1024 * 1024
    assert store.starts == [0, 2 * mebibyte, 2 * mebibyte, 3 * mebibyte]
    assert seen[0] == TransferProgress(name=NAME, completed_bytes=0, total_bytes=len(CONTENT))
    assert seen[-1].completed_bytes == len(CONTENT)


async def test_async_upload_resumes_at_the_persisted_size(
    services: Any, async_client: AsyncClient, source: Path
) -> None:
    store = UploadStore(services, break_after=(2, 0))
    seen: list[TransferProgress] = []
    done = await async_client.datasets.upload(source, progress=seen.append)
    assert done.state == Upload.STATE_COMPLETE
    assert bytes(store.stored) == CONTENT
    assert store.starts == [0, 2 * 1024 * 1024, 2 * 1024 * 1024]
    assert seen[-1].completed_bytes == len(CONTENT)


async def test_async_upload_learns_why_a_write_failed(
    services: Any, async_client: AsyncClient, source: Path
) -> None:
    # The write that meets the end of the call fails in a few of a hundred; without care it reads INTERNAL.
    for _ in range(30):
        store = UploadStore(services, break_after=(2, 0))
        await async_client.datasets.upload(source)
        assert bytes(store.stored) == CONTENT


def test_upload_whose_last_answer_is_lost_is_complete(services: Any, client: Client, source: Path) -> None:
    store = UploadStore(services)
    inner = store.write

    def write(requests: Iterator[Any], context: grpc.ServicerContext) -> Upload:
        inner(requests, context)
        services.refuse(context, grpc.StatusCode.UNAVAILABLE, "away", reason="SHUTTING_DOWN")
        raise AssertionError

    services.answers["WriteUpload"] = write
    assert client.datasets.upload(source).state == Upload.STATE_COMPLETE
    assert services.calls["WriteUpload"] == 1


def test_upload_is_taken_up_by_name(services: Any, client: Client, source: Path) -> None:
    store = UploadStore(services)
    digest = hashlib.sha256(CONTENT).hexdigest()
    store.upload = Upload(
        name=NAME, state=Upload.STATE_RECEIVING, size_bytes=len(CONTENT), sha256=digest, filename="x"
    )
    store.stored += CONTENT[:1000]
    assert client.datasets.upload(source, resume="u").state == Upload.STATE_COMPLETE
    assert store.starts == [1000]
    assert bytes(store.stored) == CONTENT
    assert services.calls["StartUpload"] == 0


def test_upload_refuses_to_go_on_with_other_bytes(services: Any, client: Client, source: Path) -> None:
    store = UploadStore(services)
    store.upload = Upload(name=NAME, state=Upload.STATE_RECEIVING, size_bytes=len(CONTENT), sha256="0" * 64)
    with pytest.raises(InvalidArgument) as caught:
        client.datasets.upload(source, resume="u")
    assert caught.value.violations[0].field == "resume"
    assert services.calls["WriteUpload"] == 0


def test_upload_reports_that_it_was_cancelled(services: Any, client: Client, source: Path) -> None:
    store = UploadStore(services)

    def write(requests: Iterator[Any], context: grpc.ServicerContext) -> None:
        store.upload.state = Upload.STATE_CANCELLED
        services.refuse(context, grpc.StatusCode.FAILED_PRECONDITION, "cancelled", reason="WRONG_STATE")

    services.answers["WriteUpload"] = write
    with pytest.raises(FailedPrecondition, match="was cancelled"):
        client.datasets.upload(source)


async def test_upload_sends_an_empty_file(
    services: Any, client: Client, async_client: AsyncClient, tmp_path: Path
) -> None:
    store = UploadStore(services)
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    assert client.datasets.upload(empty).state == Upload.STATE_COMPLETE
    store.upload = Upload()
    assert (await async_client.datasets.upload(empty)).state == Upload.STATE_COMPLETE


async def test_upload_reports_a_file_that_shrinks(
    services: Any, client: Client, async_client: AsyncClient, source: Path
) -> None:
    UploadStore(services)

    def shrink(progress: TransferProgress) -> None:
        if progress.completed_bytes == 0:
            source.write_bytes(CONTENT[:100])

    with pytest.raises(DataLoss, match="was cut to"):
        client.datasets.upload(source, progress=shrink)
    source.write_bytes(CONTENT)  # noqa: ASYNC240 - a test may block
    with pytest.raises(DataLoss, match="was cut to"):
        await async_client.datasets.upload(source, progress=shrink)


def test_upload_of_a_missing_file_fails_before_any_call(
    services: Any, client: Client, tmp_path: Path
) -> None:
    with pytest.raises(FileNotFoundError):
        client.datasets.upload(tmp_path / "none.jsonl")
    assert not services.calls


FILES = {"config.json": b'{"model_type": "llama"}', "weights/model.safetensors": CONTENT, "empty.txt": b""}


class ModelStore:
    """The download half of a model service, which breaks off each stream after `break_after` pieces."""

    def __init__(self, services: Any, *, break_after: int | None = None) -> None:
        self.services = services
        self.break_after = break_after
        self.files = dict(FILES)
        self.listed = [
            ModelFile(path=path, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
            for path, data in FILES.items()
        ]
        self.offsets: list[tuple[str, int]] = []
        services.answers["ListModelFiles"] = lambda request, context: ListModelFilesResponse(
            files=self.listed
        )
        services.answers["DownloadModelFile"] = self.send

    def send(self, request: Any, context: grpc.ServicerContext) -> Iterator[DownloadModelFileResponse]:
        assert request.uid == UID, "every request says whose file it goes on with"
        self.offsets.append((request.path, request.start_offset))
        data = self.files[request.path]
        for number, offset in enumerate(range(request.start_offset, len(data), 1 << 20)):
            if number == self.break_after:
                self.services.refuse(context, grpc.StatusCode.UNAVAILABLE, "away", reason="SHUTTING_DOWN")
            yield DownloadModelFileResponse(offset=offset, data=data[offset : offset + (1 << 20)])


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _assert_whole(folder: Path) -> None:
    assert {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    } == FILES


async def test_download_brings_all_files_over_breaks(
    services: Any, client: Client, async_client: AsyncClient, tmp_path: Path
) -> None:
    store = ModelStore(services, break_after=2)
    seen: list[TransferProgress] = []
    assert client.models.download("m", tmp_path / "sync", progress=seen.append) == tmp_path / "sync"
    _assert_whole(tmp_path / "sync")
    weights = "weights/model.safetensors"
    assert [entry for entry in store.offsets if entry[0] == weights] == [(weights, 0), (weights, 2 << 20)]
    assert seen[-1].completed_bytes == len(CONTENT)
    await async_client.models.download("m", tmp_path / "async")
    _assert_whole(tmp_path / "async")
    assert _names(tmp_path) == ["async", "sync"]


def test_download_goes_on_where_another_process_stopped(
    services: Any, client: Client, tmp_path: Path
) -> None:
    store = ModelStore(services)
    digest = hashlib.sha256(CONTENT).hexdigest()
    part = tmp_path / "out.partial" / "weights" / f"model.safetensors.{digest[:12]}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(CONTENT[:5000])
    (tmp_path / "out.partial" / "stale.bin").write_bytes(b"of another model")
    client.models.download("m", tmp_path / "out")
    _assert_whole(tmp_path / "out")
    assert ("weights/model.safetensors", 5000) in store.offsets


def test_download_begins_anew_after_damaged_bytes(services: Any, client: Client, tmp_path: Path) -> None:
    store = ModelStore(services)
    digest = hashlib.sha256(CONTENT).hexdigest()
    part = tmp_path / "out.partial" / "weights" / f"model.safetensors.{digest[:12]}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"damaged")
    client.models.download("m", tmp_path / "out")
    _assert_whole(tmp_path / "out")
    offsets = [offset for path, offset in store.offsets if path.startswith("weights")]
    assert offsets == [7, 0]


def test_download_leaves_no_folder_when_a_checksum_does_not_fit(
    services: Any, client: Client, tmp_path: Path
) -> None:
    store = ModelStore(services)
    store.files["config.json"] = b'{"model_type": "LLAMA"}'
    with pytest.raises(DataLoss, match=r"config\.json") as caught:
        client.models.download("m", tmp_path / "out")
    assert caught.value.reason == "CHECKSUM_MISMATCH"
    assert not (tmp_path / "out").exists()


def test_download_keeps_a_folder_that_is_the_model_and_refuses_another(
    services: Any, client: Client, tmp_path: Path
) -> None:
    ModelStore(services)
    (tmp_path / "out").mkdir()
    client.models.download("m", tmp_path / "out")
    calls = services.calls["DownloadModelFile"]
    client.models.download("m", tmp_path / "out")
    assert services.calls["DownloadModelFile"] == calls
    (tmp_path / "out" / "config.json").write_text("mine")
    with pytest.raises(AlreadyExists):
        client.models.download("m", tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_text() == "mine"


@pytest.mark.parametrize("path", ["../evil", "/etc/evil", "a/../../evil", ""])
def test_download_refuses_paths_outside_the_folder(
    services: Any, client: Client, tmp_path: Path, path: str
) -> None:
    store = ModelStore(services)
    store.listed = [ModelFile(path=path, size_bytes=1, sha256="0" * 64)]
    with pytest.raises(DataLoss) as caught:
        client.models.download("m", tmp_path / "out")
    assert caught.value.reason == "PATH_NOT_ALLOWED"
    assert services.calls["DownloadModelFile"] == 0


CONFIG = b'{"base_model_name_or_path": "projects/default/models/base", "r": 4}'


def adapter_store(services: Any, base: Model) -> None:
    """A tuned model beside its base."""
    store = ModelStore(services)
    store.files = {"adapter_config.json": CONFIG, "adapter_model.safetensors": b"factors"}
    store.listed = [
        ModelFile(path=path, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
        for path, data in store.files.items()
    ]
    tuned = Model(name="projects/default/models/tuned", uid=UID, base_model=base.name)
    known = {one.name: one for one in (tuned, base)}
    services.answers["GetModel"] = lambda request, context: known[request.name]


def config_of(folder: Path) -> Any:
    return json.loads((folder / "adapter_config.json").read_text())


async def test_an_adapter_names_its_base_as_peft_loads_it(
    services: Any, client: Client, async_client: AsyncClient, tmp_path: Path
) -> None:
    hub = HubSource(repo_id="org/base", revision="0123abcd")
    adapter_store(services, Model(name="projects/default/models/base", hub=hub))
    client.models.download("tuned", tmp_path / "hub")
    assert config_of(tmp_path / "hub") == {
        "base_model_name_or_path": "org/base",
        "revision": "0123abcd",
        "r": 4,
    }
    await async_client.models.download("tuned", tmp_path / "own", base=tmp_path / "base")
    assert config_of(tmp_path / "own")["base_model_name_or_path"] == str(tmp_path / "base")
    calls = services.calls["DownloadModelFile"]
    client.models.download("tuned", tmp_path / "hub")
    assert services.calls["DownloadModelFile"] == calls + 1, "it is there: only what is written anew is read"
    with pytest.raises(AlreadyExists):
        client.models.download("tuned", tmp_path / "hub", base="another")


def test_an_adapter_of_a_base_that_only_we_have_is_as_it_is_stored(
    services: Any, client: Client, tmp_path: Path
) -> None:
    adapter_store(services, Model(name="projects/default/models/base", gguf_path="/x.gguf"))
    client.models.download("tuned", tmp_path / "out")
    assert (tmp_path / "out" / "adapter_config.json").read_bytes() == CONFIG
