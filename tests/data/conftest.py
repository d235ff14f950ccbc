"""A tokenizer bundle made on the spot, and the whole Data service on real ports."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import json
import uuid
import zlib
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from tests.stores import open_database, service_blobs, service_urls
from tests.work.keepers import HoldsOfAnyone
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from luthier.data.__main__ import build, settings_of
from luthier.data.config import Config
from luthier.data.worker.build_task import Build, version_builder
from luthier.data.worker.computing import built, rendered
from luthier.data.worker.render_task import Render, renderer
from luthier.errors import AlreadyExists, NotFound
from luthier.runtime.auth import Authenticator, TaskTokens
from luthier.runtime.digests import contents_digest, files_digest
from luthier.runtime.keys import read_or_create_keys
from luthier.runtime.metrics import MetricsServer
from luthier.runtime.policies import policy_for
from luthier.runtime.server import Registration, ServerOptions, serving
from luthier.storage.opening import open_stores
from luthier.v1 import (
    data_service_pb2,
    data_service_pb2_grpc,
    dataset_pb2,
    model_pb2,
    model_service_pb2,
    model_service_pb2_grpc,
    rendering_pb2,
    upload_pb2,
)
from luthier.work.hold_servicer import POLICY as HOLD_POLICY
from luthier.work.host import hosting
from luthier.work.keeping import ANSWER_KEEP_SECONDS
from luthier.work.limited_child import Limits
from luthier.work.peers import bearer, error_of
from luthier.work.requests import SqlRequestLog
from luthier.work.tasks import TaskKind
from luthier.work.worker import WorkerSettings, work_until

PROJECT = "projects/default"
MODEL = f"{PROJECT}/models/base"
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def bundle_files() -> dict[str, bytes]:
    """A byte-level BPE tokenizer with a ChatML template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the question and the answer of the user and the assistant"] * 4, trainer)
    config = {"eos_token": "<|im_end|>", "bos_token": "<|im_start|>"}
    return {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps(config).encode(),
        "chat_template.jinja": TEMPLATE.encode(),
    }


@pytest.fixture
def bundle_folder(bundle_files: dict[str, bytes], tmp_path: Path) -> Path:
    """The bundle as files."""
    folder = tmp_path / "bundle"
    folder.mkdir()
    for name, data in bundle_files.items():
        (folder / name).write_bytes(data)
    return folder


class Models(model_service_pb2_grpc.ModelServiceServicer):
    """Models as the Training service serves them: some states and kinds, one tokenizer bundle."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.weights_sha256 = "f" * 64
        self.models = {
            model.name: model
            for model in (
                self._model("base"),
                self._model("small", context_length=48),
                self._model("silent", context_length=0),
                self._model("other-tokenizer", tokenizer_digest="0" * 64),
                self._model("registering", state=model_pb2.Model.STATE_REGISTERING),
                self._model("adapter", kind=model_pb2.Model.KIND_ADAPTER, base_model=MODEL),
                self._model("exported", kind=model_pb2.Model.KIND_EXPORT),
            )
        }

    def _model(self, model_id: str, **changes: Any) -> model_pb2.Model:
        values = {
            "name": f"projects/default/models/{model_id}",
            "uid": str(uuid.uuid4()),
            "state": model_pb2.Model.STATE_READY,
            "kind": model_pb2.Model.KIND_BASE,
            "digest": files_digest(self.sha256()),
            "tokenizer_digest": contents_digest(self.files),
            "context_length": 512,
            **changes,
        }
        return model_pb2.Model(**values)

    def sha256(self) -> dict[str, str]:
        """The digests of every model's files, by path: the bundle, and weights that nobody fetches."""
        bundle = {path: hashlib.sha256(data).hexdigest() for path, data in self.files.items()}
        return {**bundle, "model.safetensors": self.weights_sha256}

    async def GetModel(self, request: Any, context: Any) -> model_pb2.Model:  # noqa: N802
        if request.name not in self.models:
            raise NotFound(f"{request.name} does not exist")
        return self.models[request.name]

    async def ListModelFiles(self, request: Any, context: Any) -> Any:  # noqa: N802
        files = [
            model_pb2.ModelFile(
                path=path,
                sha256=sha256,
                size_bytes=len(self.files.get(path, b"w")),
                tokenizer=path in self.files,
            )
            for path, sha256 in self.sha256().items()
        ]
        return model_service_pb2.ListModelFilesResponse(files=files)

    async def DownloadModelFile(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        data = self.files[request.path]
        yield model_service_pb2.DownloadModelFileResponse(offset=0, data=data)


class Service:
    """The Data service, a ModelService and a data worker on real ports, and calls to them with the API key."""

    def __init__(self, home: Path, files: dict[str, bytes]) -> None:
        self.home = home
        self.keys = read_or_create_keys(home)
        self.task_tokens = TaskTokens(self.keys.token_secret)
        self.models = Models(files)  # type: ignore[abstract]
        self.holds = HoldsOfAnyone()
        self.limits = Limits(cpu_seconds=2, memory_bytes=512 << 20)
        self.min_free_bytes = 0
        self.address = self.models_address = ""
        self._stack = AsyncExitStack()

    async def start(self) -> None:
        """Serve. A second start is a restart on the same home and ports."""
        self._stack = AsyncExitStack()
        self.models_stack = await self._stack.enter_async_context(AsyncExitStack())
        await self._start_models()
        config = Config(
            home=self.home,
            log_level="INFO",
            projects=("default", "second"),
            data_address=self.address or "127.0.0.1:0",
            training_address=self.models_address,
            metrics_address="127.0.0.1:0",
            min_free_bytes=self.min_free_bytes,
            **service_urls(self.home, "data"),
        )
        port = await self._stack.enter_async_context(
            hosting(settings_of(config), lambda parts: build(parts, config), open_stores)
        )
        self.address = f"127.0.0.1:{port}"
        self.blobs = service_blobs(self.home, "data")
        channel = grpc.aio.insecure_channel(self.address)
        self._stack.push_async_callback(channel.close)
        self.stub = data_service_pb2_grpc.DataServiceStub(channel)

    async def _start_models(self) -> None:
        descriptor = model_service_pb2.DESCRIPTOR.services_by_name["ModelService"]
        # It answers no call that could be repeated, so its log of requests is never looked at.
        database = open_database(self.home / "models")
        self.models_stack.push_async_callback(database.close)
        running = await self.models_stack.enter_async_context(
            serving(
                ServerOptions(address=self.models_address or "127.0.0.1:0", drain_seconds=0.0),
                [
                    Registration(
                        add=model_service_pb2_grpc.add_ModelServiceServicer_to_server,
                        servicer=self.models,
                        name=descriptor.full_name,
                    ),
                    self.holds.registration(),
                ],
                authenticator=Authenticator(self.keys),
                policy={
                    **policy_for(descriptor, "reader", "task"),
                    **HOLD_POLICY,
                },
                request_log=SqlRequestLog(database, ANSWER_KEEP_SECONDS),
                metrics=MetricsServer("127.0.0.1:0"),
            )
        )
        self.models_address = f"127.0.0.1:{running.port}"

    async def stop(self) -> None:
        """Stop serving at once."""
        await self._stack.aclose()
        # A server that is collected after its event loop has closed complains.
        gc.collect()

    @asynccontextmanager
    async def worker(self, build: Build = built, render: Render | None = None) -> AsyncIterator[None]:
        """Run a data worker for the length of a block; it computes in this process unless it is told where."""
        settings = WorkerSettings(
            service_address=self.address,
            worker_id="data",
            credential=self.keys.worker_key,
            work_folder=self.home / "work",
            cache_folder=self.home / "cache",
            cache_bytes=1 << 30,
        )
        runners = {
            TaskKind.BUILD_VERSION: version_builder(build),
            TaskKind.RENDER: renderer(self.models_address, render or partial(rendered, limits=self.limits)),
        }
        stopping = asyncio.Event()
        work = asyncio.create_task(work_until(settings, runners, stopping))
        try:
            yield
        finally:
            stopping.set()
            await work

    async def call(self, method: str, request: Any, *, key: str | None = None, **options: Any) -> Any:
        """Make a unary call; raise what the service answered as the error tree."""
        metadata = bearer(self.keys.api_key if key is None else key)
        try:
            return await getattr(self.stub, method)(request, metadata=metadata, timeout=20, **options)
        except grpc.aio.AioRpcError as error:
            raise error_of(error) from error

    async def stream(self, method: str, request: Any, *, key: str | None = None) -> list[Any]:
        """Make a call that streams, and return all messages."""
        metadata = bearer(self.keys.api_key if key is None else key)
        try:
            return [
                message
                async for message in getattr(self.stub, method)(request, metadata=metadata, timeout=30)
            ]
        except grpc.aio.AioRpcError as error:
            raise error_of(error) from error

    async def uploaded(self, data: bytes, filename: str = "a.jsonl", parent: str = PROJECT) -> str:
        """Upload a file; return the upload's name."""
        upload = upload_pb2.Upload(filename=filename, size_bytes=len(data))
        started = await self.call(
            "StartUpload", data_service_pb2.StartUploadRequest(parent=parent, upload=upload)
        )

        async def chunks() -> AsyncIterator[Any]:
            for offset in range(0, max(len(data), 1), 1 << 20):
                part = data[offset : offset + (1 << 20)]
                yield data_service_pb2.WriteUploadRequest(
                    name=started.name,
                    offset=offset,
                    data=part,
                    crc32=zlib.crc32(part),
                    finish=offset + len(part) == len(data),
                )

        done = await self.call("WriteUpload", chunks())
        return str(done.name)

    async def version(
        self, *sources: bytes, dataset: str = "news", **fields: Any
    ) -> dataset_pb2.DatasetVersion:
        """Upload files and build a version of them with the running worker; return it in its final state."""
        with suppress(AlreadyExists):
            await self.call(
                "CreateDataset",
                data_service_pb2.CreateDatasetRequest(
                    parent=PROJECT, dataset_id=dataset, dataset=dataset_pb2.Dataset()
                ),
            )
        uploads = [await self.uploaded(data, f"{index}.jsonl") for index, data in enumerate(sources)]
        wanted = dataset_pb2.DatasetVersion(
            sources=[dataset_pb2.DatasetSource(upload=upload) for upload in uploads], **fields
        )
        created = await self.call(
            "CreateDatasetVersion",
            data_service_pb2.CreateDatasetVersionRequest(
                parent=f"{PROJECT}/datasets/{dataset}", dataset_version=wanted
            ),
        )
        await self.stream(
            "WatchDatasetVersion", data_service_pb2.WatchDatasetVersionRequest(name=created.name)
        )
        request = data_service_pb2.GetDatasetVersionRequest(name=created.name)
        return await self.call("GetDatasetVersion", request)  # type: ignore[no-any-return]

    async def rendering(self, version: str, model: str = MODEL, **fields: Any) -> rendering_pb2.Rendering:
        """Render a version with the running worker; return the rendering in its final state."""
        wanted = rendering_pb2.Rendering(dataset_version=version, model=model, **fields)
        created = await self.call(
            "CreateRendering",
            data_service_pb2.CreateRenderingRequest(parent=PROJECT, rendering=wanted),
        )
        await self.stream("WatchRendering", data_service_pb2.WatchRenderingRequest(name=created.name))
        request = data_service_pb2.GetRenderingRequest(name=created.name)
        return await self.call("GetRendering", request)  # type: ignore[no-any-return]


@pytest.fixture
async def service(tmp_path: Path, bundle_files: dict[str, bytes]) -> AsyncIterator[Service]:
    """A running service without a worker."""
    service = Service(tmp_path / "home", bundle_files)
    await service.start()
    yield service
    await service.stop()
