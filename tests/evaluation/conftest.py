"""The whole Evaluation service on real ports, beside a Data and a Model service that serve a tiny model's files."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import json
import threading
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import grpc.aio
import pyarrow
import pytest
import torch
from tests.evaluation.here import NO_ROOM, Here
from tests.evaluation.tiny_models import write_adapter, write_base
from tests.work.keepers import HoldsOfAnyone

from luthier.errors import NotFound
from luthier.evaluation.__main__ import build, settings_of
from luthier.evaluation.config import Config
from luthier.evaluation.worker.answers import ModelAnswers, serve_generations
from luthier.evaluation.worker.engine import Start
from luthier.evaluation.worker.evaluate import Evaluator
from luthier.evaluation.worker.models import Models
from luthier.evaluation.worker.room import Room
from luthier.runtime.auth import Authenticator, Kind
from luthier.runtime.digests import files_digest
from luthier.runtime.keys import read_or_create_keys
from luthier.runtime.metrics import MetricsServer
from luthier.runtime.server import Registration, ServerOptions, serving
from luthier.storage.database import Database
from luthier.text.records import ChatRecord, Message, Record, record_id, record_to_json
from luthier.v1 import (
    arrow_pb2,
    data_service_pb2,
    data_service_pb2_grpc,
    dataset_pb2,
    evaluation_pb2,
    evaluation_service_pb2,
    evaluation_service_pb2_grpc,
    model_pb2,
    model_service_pb2,
    model_service_pb2_grpc,
)
from luthier.v1.base_precision_pb2 import BASE_PRECISION_UNSPECIFIED, BasePrecision
from luthier.work.cache import BlobCache
from luthier.work.hold_servicer import POLICY as HOLD_POLICY
from luthier.work.host import hosting
from luthier.work.link import WorkerLink
from luthier.work.peers import bearer, error_of
from luthier.work.requests import SqlRequestLog
from luthier.work.tasks import TaskKind
from luthier.work.worker import WorkerSettings, work_until

PROJECT = "projects/default"
VERSION = f"{PROJECT}/datasets/things/versions/v1"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads that wait for one another on a busy machine cost more than such small models take."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two random base models, and two adapters of the first."""
    root = tmp_path_factory.mktemp("models")
    folders = {name: root / name for name in ("base", "other", "tuned", "tuned-more")}
    write_base(folders["base"], 0)
    write_base(folders["other"], 1)
    write_adapter(folders["base"], folders["tuned"], 2)
    write_adapter(folders["base"], folders["tuned-more"], 3)
    return folders


def thing(number: int) -> ChatRecord:
    """A question whose answer is a JSON object."""
    answer = json.dumps({"colour": ("red", "green", "blue")[number % 3], "number": number})
    question = f"what colour has thing {number}?"
    return ChatRecord(
        messages=(Message(role="user", content=question), Message(role="assistant", content=answer))
    )


@dataclass
class DataServer(data_service_pb2_grpc.DataServiceServicer):
    """One dataset version, as the Data service serves it."""

    records: dict[str, list[Record]] = field(
        default_factory=lambda: {
            "TRAIN": [thing(number) for number in range(100, 108)],
            "TEST": [thing(number) for number in range(12)],
        }
    )
    num_texts_read: int = 0
    digest: str = "d" * 64

    async def GetDatasetVersion(self, request: Any, context: Any) -> dataset_pb2.DatasetVersion:  # noqa: N802
        if request.name != VERSION:
            raise NotFound(f"{request.name} does not exist")
        splits = [
            dataset_pb2.SplitStatistics(
                split=dataset_pb2.Split.Value(f"SPLIT_{name}"), num_records=len(found)
            )
            for name, found in self.records.items()
        ]
        return dataset_pb2.DatasetVersion(
            name=VERSION,
            uid=uid_of(VERSION),
            state=dataset_pb2.DatasetVersion.STATE_READY,
            digest=self.digest,
            statistics=dataset_pb2.DatasetStatistics(splits=splits),
        )

    async def ReadRecords(self, request: Any, context: Any) -> AsyncIterator[arrow_pb2.ArrowChunk]:  # noqa: N802
        wanted = dataset_pb2.Split.Name(request.split).removeprefix("SPLIT_")
        every = [
            (name, line, record)
            for name, found in self.records.items()
            for line, record in enumerate(found, start=1)
        ]
        rows = [
            (row, name, line, record)
            for row, (name, line, record) in enumerate(every)
            if name == wanted and row >= request.start_row
        ]
        for row, name, line, record in rows:
            columns: dict[str, list[Any]] = {
                "row": [row],
                "record_id": [record_id(record)],
                "split": [name],
                "filename": [f"{name.lower()}.jsonl"],
                "line": [line],
                "record": [record_to_json(record)],
            }
            if request.ids_only:
                columns = {name: columns[name] for name in ("row", "record_id")}
            else:
                self.num_texts_read += 1
            table = pyarrow.table(columns)
            sink = pyarrow.BufferOutputStream()
            with pyarrow.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table)
            yield arrow_pb2.ArrowChunk(ipc=sink.getvalue().to_pybytes(), first_row=row, num_rows=1)


class ModelServer(model_service_pb2_grpc.ModelServiceServicer):
    """The tiny models, as the Training service serves them. `downloads` counts the files that were sent."""

    def __init__(self, folders: dict[str, Path]) -> None:
        self.folders = folders
        self.downloads = 0
        self.states: dict[str, model_pb2.Model.State.ValueType] = {}
        self.eos_token_ids: dict[str, list[int]] = {}
        self.taught: dict[str, model_pb2.Taught] = {}
        self.precisions: dict[str, BasePrecision.ValueType] = {}

    async def GetModel(self, request: Any, context: Any) -> model_pb2.Model:  # noqa: N802
        name = request.name.rsplit("/", 1)[-1]
        if name not in self.folders:
            raise NotFound(f"{request.name} does not exist")
        return model_pb2.Model(
            name=request.name,
            uid=uid_of(name),
            state=self.states.get(name, model_pb2.Model.STATE_READY),
            digest=digest_of(self.folders[name]),
            base_model=f"{PROJECT}/models/base" if name.startswith("tuned") else "",
            has_chat_template=True,
            eos_token_ids=self.eos_token_ids.get(name, ()),
            taught=self.taught.get(name),
            base_precision=self.precisions.get(name, BASE_PRECISION_UNSPECIFIED),
        )

    async def ListModelFiles(self, request: Any, context: Any) -> Any:  # noqa: N802
        name = request.parent.rsplit("/", 1)[-1]
        if name not in self.folders:
            raise NotFound(f"{request.parent} does not exist")
        return model_service_pb2.ListModelFilesResponse(
            files=[
                model_pb2.ModelFile(
                    path=path, sha256=sha256, size_bytes=(self.folders[name] / path).stat().st_size
                )
                for path, sha256 in sorted(files_of(self.folders[name]).items())
            ]
        )

    async def DownloadModelFile(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        self.downloads += 1
        data = (self.folders[request.name.rsplit("/", 1)[-1]] / request.path).read_bytes()
        for offset in range(0, len(data), 1 << 20):
            part = data[offset : offset + (1 << 20)]
            yield model_service_pb2.DownloadModelFileResponse(offset=offset, data=part)


def uid_of(name: str) -> str:
    """Return the uid that a resource of the fixtures goes by."""
    return str(uuid.uuid5(uuid.NAMESPACE_URL, name))


def files_of(folder: Path) -> dict[str, str]:
    """Return the sha256 of a model's files by their paths."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def digest_of(folder: Path) -> str:
    """Return the digest of a model that has the files of a folder."""
    return files_digest(files_of(folder))


class Site:
    """The Evaluation service, its peers, and calls to it with the API key."""

    LEASE_SECONDS: ClassVar[float] = 30.0
    PARENT: ClassVar[str] = PROJECT
    VERSION: ClassVar[str] = VERSION

    def __init__(self, home: Path, folders: dict[str, Path]) -> None:
        self.home = home
        home.mkdir()
        self.keys = read_or_create_keys(home)
        self.data = DataServer()  # type: ignore[abstract]
        self.models = ModelServer(folders)  # type: ignore[abstract]
        self.address = self.peers_address = ""
        self._stack = AsyncExitStack()

    async def start(self) -> None:
        """Serve."""
        await self._start_peers()
        config = Config(
            home=self.home,
            log_level="INFO",
            projects=("default",),
            data_address=self.peers_address,
            training_address=self.peers_address,
            evaluation_address="127.0.0.1:0",
            reward_addresses=("127.0.0.1",),
            metrics_address="127.0.0.1:0",
            lease_seconds=self.LEASE_SECONDS,
        )
        hosted = hosting(settings_of(config), lambda parts: build(parts, config))
        port = await self._stack.enter_async_context(hosted)
        self.address = f"127.0.0.1:{port}"
        channel = grpc.aio.insecure_channel(self.address)
        self._stack.push_async_callback(channel.close)
        self.stub = evaluation_service_pb2_grpc.EvaluationServiceStub(channel)

    async def _start_peers(self) -> None:
        database = Database(f"sqlite+aiosqlite:///{self.home / 'peers.db'}")
        self._stack.push_async_callback(database.close)
        data = data_service_pb2.DESCRIPTOR.services_by_name["DataService"]
        model = model_service_pb2.DESCRIPTOR.services_by_name["ModelService"]
        tasks: frozenset[Kind] = frozenset({"task"})
        running = await self._stack.enter_async_context(
            serving(
                ServerOptions(address="127.0.0.1:0", drain_seconds=0.0),
                [
                    Registration(
                        add=data_service_pb2_grpc.add_DataServiceServicer_to_server,
                        servicer=self.data,
                        name=data.full_name,
                    ),
                    Registration(
                        add=model_service_pb2_grpc.add_ModelServiceServicer_to_server,
                        servicer=self.models,
                        name=model.full_name,
                    ),
                    HoldsOfAnyone().registration(),
                ],
                authenticator=Authenticator(self.keys),
                policy={
                    **{
                        f"/{service.full_name}/{method.name}": tasks
                        for service in (data, model)
                        for method in service.methods
                    },
                    **HOLD_POLICY,
                },
                request_log=SqlRequestLog(database),
                metrics=MetricsServer("127.0.0.1:0"),
            )
        )
        self.peers_address = f"127.0.0.1:{running.port}"

    async def stop(self) -> None:
        """Stop serving at once."""
        await self._stack.aclose()
        # A server that is collected after its event loop has closed complains.
        gc.collect()

    @asynccontextmanager
    async def worker(self, start: Start = Here, room: Room = NO_ROOM, name: str = "") -> AsyncIterator[None]:
        """Run an evaluation worker for the length of a block; in this process, with one base model at a time."""
        cache = BlobCache(self.home / "cache", 1 << 30)
        held = Models(self.peers_address, cache, self.home / f"laid-out{name}", start, room)
        answers = ModelAnswers(held)
        taking = asyncio.Event()

        async def companion(link: WorkerLink, cache: BlobCache) -> None:
            taking.set()
            await serve_generations(link, cache, answers)

        worker_settings = WorkerSettings(
            service_address=self.address,
            worker_id=f"evaluation{name}",
            credential=self.keys.worker_key,
            work_folder=self.home / f"work{name}",
            cache_folder=self.home / "cache",
            cache_bytes=1 << 30,
            companions=(companion,),
        )
        stopping = asyncio.Event()
        evaluator = Evaluator(self.peers_address, held)
        with closing(held), closing(evaluator):
            runners = dict.fromkeys((TaskKind.EVALUATE, TaskKind.ANSWER_SHARE), evaluator)
            work = asyncio.create_task(work_until(worker_settings, runners, stopping))
            await taking.wait()
            await asyncio.sleep(0.1)
            try:
                yield
            finally:
                stopping.set()
                await asyncio.wait_for(work, 60)

    async def call(self, method: str, request: Any, *, key: str | None = None) -> Any:
        """Make a unary call; raise what the service answered as the error tree."""
        sent = bearer(self.keys.api_key if key is None else key)
        try:
            return await getattr(self.stub, method)(request, metadata=sent, timeout=20)
        except grpc.aio.AioRpcError as error:
            raise error_of(error) from error

    async def evaluate(self, **fields: Any) -> evaluation_pb2.Evaluation:
        """Queue an evaluation of the version; arms are given as (id, model, number of examples)."""
        arms = [
            evaluation_pb2.EvaluationArm(arm_id=arm_id, model=f"{PROJECT}/models/{model}", num_shots=shots)
            for arm_id, model, shots in fields.pop("arms", [("zero", "base", 0)])
        ]
        request = evaluation_service_pb2.CreateEvaluationRequest(parent=PROJECT)
        request.evaluation.CopyFrom(evaluation_pb2.Evaluation(dataset_version=VERSION, arms=arms, **fields))
        return await self.call("CreateEvaluation", request)  # type: ignore[no-any-return]

    async def get(self, name: str) -> evaluation_pb2.Evaluation:
        """Read an evaluation."""
        wanted = evaluation_service_pb2.GetEvaluationRequest(name=name)
        return await self.call("GetEvaluation", wanted)  # type: ignore[no-any-return]

    async def ended(self, name: str) -> evaluation_pb2.Evaluation:
        """Wait for an evaluation's end and return it."""
        watch = evaluation_service_pb2.WatchEvaluationRequest(name=name)
        _ = [event async for event in self.stream("WatchEvaluation", watch)]
        return await self.get(name)

    async def until_running(self, name: str) -> None:
        """Wait until the arms of an evaluation have begun to answer."""
        request = evaluation_service_pb2.WatchEvaluationRequest(name=name)
        async for event in self.stream("WatchEvaluation", request):
            if event.progress.total:
                return
        raise AssertionError(f"{name} ended before an arm began to answer")

    async def predictions(self, name: str) -> list[evaluation_pb2.Prediction]:
        """Read all answers of an evaluation."""
        request = evaluation_service_pb2.ListPredictionsRequest(parent=name, page_size=1000)
        return list((await self.call("ListPredictions", request)).predictions)

    async def said(self, model: str, prompt: str, **fields: Any) -> str:
        """Generate text and return the whole answer."""
        asked = evaluation_service_pb2.GenerateTextRequest(prompt=prompt, **fields)
        asked.model = f"{PROJECT}/models/{model}"
        return "".join([piece.text async for piece in self.stream("GenerateText", asked)])

    async def stream(self, method: str, request: Any) -> AsyncIterator[Any]:
        """Make a call that streams."""
        try:
            sent = bearer(self.keys.api_key)
            async for message in getattr(self.stub, method)(request, metadata=sent, timeout=240):
                yield message
        except grpc.aio.AioRpcError as error:
            raise error_of(error) from error


@pytest.fixture
async def site(tmp_path: Path, model_folders: dict[str, Path]) -> AsyncIterator[Site]:
    """A running service without a worker; no engine outlives the test."""
    running = Site(tmp_path / "home", model_folders)
    await running.start()
    yield running
    await running.stop()
    assert not [thread for thread in threading.enumerate() if thread.name == "engine"]
