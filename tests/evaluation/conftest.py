"""The whole Evaluation service on real ports, beside a Data and a Model service that serve a tiny model's files."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, closing
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import grpc.aio
import pytest
import torch
from tests.evaluation.here import NO_ROOM, Here
from tests.evaluation.peer_servers import PROJECT, VERSION, DataServer, ModelServer, TrainingServer
from tests.evaluation.tiny_models import write_adapter, write_base
from tests.stores import open_database, service_urls
from tests.work.keepers import HoldsOfAnyone

from luthier.evaluation.__main__ import build, settings_of
from luthier.evaluation.access import Access
from luthier.evaluation.config import Config
from luthier.evaluation.generation.exchange import Exchange
from luthier.evaluation.worker.answers import ModelAnswers, serve_generations
from luthier.evaluation.worker.engine import Start
from luthier.evaluation.worker.evaluate import Evaluator
from luthier.evaluation.worker.models import Models
from luthier.evaluation.worker.room import Room
from luthier.runtime.auth import Authenticator
from luthier.runtime.keys import read_or_create_keys
from luthier.runtime.metrics import MetricsServer
from luthier.runtime.policies import policy_for
from luthier.runtime.server import Registration, ServerOptions, serving
from luthier.storage.opening import open_stores
from luthier.v1 import (
    data_service_pb2,
    data_service_pb2_grpc,
    evaluation_pb2,
    evaluation_service_pb2,
    evaluation_service_pb2_grpc,
    model_service_pb2,
    model_service_pb2_grpc,
    training_service_pb2,
    training_service_pb2_grpc,
)
from luthier.work.cache import BlobCache
from luthier.work.hold_servicer import POLICY as HOLD_POLICY
from luthier.work.host import Hosted, Parts, hosting
from luthier.work.judge_access import JudgeAccess
from luthier.work.keeping import ANSWER_KEEP_SECONDS
from luthier.work.peers import bearer, error_of
from luthier.work.requests import SqlRequestLog
from luthier.work.rewards import RewardAddresses
from luthier.work.tasks import TaskKind
from luthier.work.worker import WorkerSettings, work_until

JUDGE_KEY = "sk-that-nobody-may-see"
JUDGE_KEYS = ("JUDGE_KEY@127.0.0.1", "OTHER_KEY@127.0.0.1")
"""The worker has the first alone."""


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
            judge_addresses=("127.0.0.1",),
            judge_keys=JUDGE_KEYS,
            metrics_address="127.0.0.1:0",
            lease_seconds=self.LEASE_SECONDS,
            **service_urls(self.home, "evaluation"),
        )

        def built(parts: Parts) -> Hosted:
            made = build(parts, config)
            assert isinstance(made.generations, Exchange)
            self._exchange = made.generations
            return made

        hosted = hosting(settings_of(config), built, open_stores)
        port = await self._stack.enter_async_context(hosted)
        self.address = f"127.0.0.1:{port}"
        channel = grpc.aio.insecure_channel(self.address)
        self._stack.push_async_callback(channel.close)
        self.stub = evaluation_service_pb2_grpc.EvaluationServiceStub(channel)

    async def _start_peers(self) -> None:
        database = open_database(self.home / "peers")
        self._stack.push_async_callback(database.close)
        data = data_service_pb2.DESCRIPTOR.services_by_name["DataService"]
        model = model_service_pb2.DESCRIPTOR.services_by_name["ModelService"]
        training = training_service_pb2.DESCRIPTOR.services_by_name["TrainingService"]
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
                    Registration(
                        add=training_service_pb2_grpc.add_TrainingServiceServicer_to_server,
                        servicer=TrainingServer(),  # type: ignore[abstract]
                        name=training.full_name,
                    ),
                    HoldsOfAnyone().registration(),
                ],
                authenticator=Authenticator(self.keys),
                policy={
                    **policy_for(data, "task"),
                    **policy_for(model, "task"),
                    **policy_for(training, "task"),
                    **HOLD_POLICY,
                },
                request_log=SqlRequestLog(database, ANSWER_KEEP_SECONDS),
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
        worker_settings = WorkerSettings(
            service_address=self.address,
            worker_id=f"evaluation{name}",
            credential=self.keys.worker_key,
            work_folder=self.home / f"work{name}",
            cache_folder=self.home / "cache",
            cache_bytes=1 << 30,
            companions=(partial(serve_generations, answering=answers),),
        )
        stopping = asyncio.Event()
        access = Access(
            judges=JudgeAccess(("127.0.0.1",), JUDGE_KEYS, {"JUDGE_KEY": JUDGE_KEY}),
            rewards=RewardAddresses(("127.0.0.1",)),
        )
        evaluator = Evaluator(self.peers_address, held, access)
        with closing(held), closing(evaluator):
            runners = dict.fromkeys((TaskKind.EVALUATE, TaskKind.ANSWER_SHARE), evaluator)
            before = list(self._exchange._takers)
            work = asyncio.create_task(work_until(worker_settings, runners, stopping))
            try:
                await self._until_taken(before)
                yield
            finally:
                stopping.set()
                await asyncio.wait_for(work, 60)

    async def _until_taken(self, before: Sequence[object]) -> None:
        """Wait until a worker takes orders for text that did not before."""
        async with asyncio.timeout(30):
            while all(any(one is known for known in before) for one in self._exchange._takers):  # noqa: ASYNC110
                await asyncio.sleep(0.005)

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
