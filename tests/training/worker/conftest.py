"""A real Training service, a Data service that serves one small rendering, and a worker of theirs."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import grpc
import pyarrow
import pytest
import torch
from tests.stores import service_urls
from tests.work.keepers import HoldsOfAnyone
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from luthier.lm.made import Made
from luthier.runtime.keys import read_or_create_keys
from luthier.storage.opening import open_stores
from luthier.training.__main__ import build, settings_of
from luthier.training.config import Config
from luthier.training.recipes.course import TIMED_METRICS
from luthier.training.worker import held_out
from luthier.training.worker.computing import computed
from luthier.training.worker.making import Make, make_here, run_export, run_merge
from luthier.training.worker.order import Desk, MakeOrder, TrainEnd, TrainOrder
from luthier.training.worker.register import Register, register_here, run_register
from luthier.training.worker.train import Compute, Trainer
from luthier.v1 import (
    arrow_pb2,
    data_service_pb2,
    data_service_pb2_grpc,
    dataset_pb2,
    event_pb2,
    fine_tuning_job_pb2,
    model_pb2,
    model_service_pb2,
    model_service_pb2_grpc,
    rendering_pb2,
    training_service_pb2,
    training_service_pb2_grpc,
)
from luthier.work.children import Children, Program
from luthier.work.context import TaskContext
from luthier.work.device import Setup
from luthier.work.host import hosting
from luthier.work.peers import channel
from luthier.work.requirements import Equipment
from luthier.work.rewards import RewardAddresses
from luthier.work.running import Runner
from luthier.work.tasks import TaskKind
from luthier.work.worker import WorkerSettings, work_until
from luthier.worker.v1 import hold_service_pb2_grpc

PARENT = "projects/default"
MODEL = f"{PARENT}/models/tiny"
RENDERING = f"{PARENT}/renderings/songs"
SPLITS = {"TRAIN": dataset_pb2.SPLIT_TRAIN, "VALIDATION": dataset_pb2.SPLIT_VALIDATION}


# gRPC decides the names of a servicer's methods.
# ruff: noqa: N802
class SmallDataService(data_service_pb2_grpc.DataServiceServicer):
    """Serves one rendering, seven rows a chunk, and `others` by name; remembers the credentials it was shown."""

    def __init__(self, rows: list[Any], name: str = RENDERING, filename: str = "a.jsonl") -> None:
        self.rows = rows
        self.name = name
        self.filename = filename
        self.others: dict[str, SmallDataService] = {}
        self.kind = rendering_pb2.RENDERING_KIND_UNSPECIFIED
        self.tokenizer_digest = ""
        self.chat_template = ""
        self.digest = "r" * 64
        self.digest_once_read = self.digest
        self.credentials: set[str] = set()

    async def GetRendering(
        self, request: data_service_pb2.GetRenderingRequest, context: Any
    ) -> rendering_pb2.Rendering:
        self.credentials.add(dict(context.invocation_metadata())["authorization"])
        if request.name in self.others:
            return await self.others[request.name].GetRendering(request, context)
        if request.name != self.name:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"{request.name} does not exist")
        return rendering_pb2.Rendering(
            name=self.name,
            uid="2f6d1c7e-5a0b-4f0e-9a43-0d3c8f3b9e11",
            state=rendering_pb2.Rendering.STATE_READY,
            digest=self.digest,
            kind=self.kind,
            tokenizer_digest=self.tokenizer_digest,
            effective_chat_template=self.chat_template,
            stop_token_ids=[2] if self.kind == rendering_pb2.RENDERING_KIND_PROMPT else [],
            split_statistics=[
                rendering_pb2.RenderingSplitStatistics(
                    split=number, tokens=self._tokens(split), num_unsupervised=self._idle(split)
                )
                for split, number in SPLITS.items()
            ],
        )

    def _idle(self, split: str) -> int:
        if self.kind == rendering_pb2.RENDERING_KIND_PROMPT:
            return 0  # as real ones count prompts
        return sum(row.split == split and not any(row.loss_mask) for row in self.rows)

    def _tokens(self, split: str) -> rendering_pb2.LengthStatistics:
        lengths = [len(row.input_ids) for row in self.rows if row.split == split]
        return rendering_pb2.LengthStatistics(count=len(lengths), sum=sum(lengths), maximum=max(lengths))

    async def ReadRendering(
        self, request: data_service_pb2.ReadRenderingRequest, context: Any
    ) -> AsyncIterator[arrow_pb2.ArrowChunk]:
        if request.name in self.others:
            async for chunk in self.others[request.name].ReadRendering(request, context):
                yield chunk
            return
        rows = [row for row in self.rows if row.row >= request.start_row]
        for start in range(0, len(rows), 7):
            part = rows[start : start + 7]
            columns: dict[str, list[Any]] = {
                "row": [row.row for row in part],
                "split": [row.split for row in part],
            }
            if self.kind:
                columns["unit"] = [row.unit for row in part]
            if request.view == data_service_pb2.ReadRenderingRequest.VIEW_LENGTHS:
                columns["num_tokens"] = [len(row.input_ids) for row in part]
                columns["num_supervised"] = [sum(row.loss_mask) for row in part]
            else:
                columns["input_ids"] = [row.input_ids for row in part]
                columns["loss_mask"] = [row.loss_mask for row in part]
                columns["filename"] = [self.filename for _ in part]
                columns["line"] = [row.row + 1 for row in part]
                columns["role"] = [row.role for row in part]
                if self.kind == rendering_pb2.RENDERING_KIND_PROMPT:
                    columns["record"] = [row.record for row in part]
                    columns["record_id"] = [f"{row.row:064x}" for row in part]
            sink = pyarrow.BufferOutputStream()
            batch = pyarrow.RecordBatch.from_pydict(columns)
            with pyarrow.ipc.new_stream(sink, batch.schema) as writer:
                writer.write_batch(batch)
            yield arrow_pb2.ArrowChunk(
                ipc=sink.getvalue().to_pybytes(), first_row=part[0].row, num_rows=len(part)
            )
        self.digest = self.digest_once_read


def compute_here(order: TrainOrder, desk: Desk, context: TaskContext) -> TrainEnd:
    """Train in this very process: what a test is about is often not where."""
    return computed(order, desk, torch.device("cpu"))


def make_with_check(order: MakeOrder, context: TaskContext) -> Made:
    """Merge or export in this very process."""
    return make_here(order, context.check)


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """A running Training service, its stubs, and what a worker needs."""

    home: Path
    address: str
    data_address: str
    data: SmallDataService
    models: Any
    jobs: Any
    metadata: tuple[tuple[str, str], ...]

    @asynccontextmanager
    async def worker(
        self,
        stopping: asyncio.Event | None = None,
        register: Register = register_here,
        compute: Compute | None = None,
        make: Make = make_with_check,
        equipment: Equipment = Equipment(),  # noqa: B008 - it never changes
    ) -> AsyncIterator[None]:
        """Run a worker for the length of the block, or until `stopping` is set; models lie in `models` of the home."""
        stopping = stopping or asyncio.Event()
        settings = WorkerSettings(
            service_address=self.address,
            worker_id="training",
            credential=read_or_create_keys(self.home).worker_key,
            work_folder=self.home / "work",
            cache_folder=self.home / "cache",
            cache_bytes=1 << 30,
            equipment=equipment,
        )
        with channel(self.data_address) as data_channel:
            runners: Mapping[TaskKind, Runner] = {
                TaskKind.REGISTER_MODEL: partial(
                    run_register, register=register, roots=[self.home / "models"]
                ),
                TaskKind.MERGE: partial(run_merge, make=make),
                TaskKind.EXPORT: partial(run_export, make=make),
                TaskKind.TRAIN: Trainer(
                    data_channel, compute or compute_here, RewardAddresses(("127.0.0.1",))
                ),
            }
            work = asyncio.create_task(work_until(settings, runners, stopping))
            try:
                yield
            finally:
                stopping.set()
                await work

    async def register(self, folder: Path, model_id: str = "tiny") -> model_pb2.Model:
        """Register a folder and wait for the end."""
        return await self.register_from(model_pb2.Model(directory=str(folder)), model_id)

    async def register_from(self, source: model_pb2.Model, model_id: str) -> model_pb2.Model:
        """Register a model and wait for the end."""
        request = model_service_pb2.RegisterBaseModelRequest(parent=PARENT, model_id=model_id, model=source)
        made = await self.models.RegisterBaseModel(request, metadata=self.metadata)
        return await self.made(made.name)

    async def made(self, name: str) -> model_pb2.Model:
        """Wait for the end of a model's making, and return it."""
        watch = model_service_pb2.WatchModelRequest(name=name)
        async for _ in self.models.WatchModel(watch, metadata=self.metadata):
            pass
        request = model_service_pb2.GetModelRequest(name=name)
        model: model_pb2.Model = await self.models.GetModel(request, metadata=self.metadata)
        return model

    async def merge(self, name: str, model_id: str) -> model_pb2.Model:
        """Merge an adapter or a checkpoint, and wait for the end."""
        request = model_service_pb2.MergeModelRequest(name=name, model_id=model_id)
        return await self.made((await self.models.MergeModel(request, metadata=self.metadata)).name)

    async def create(self, job_id: str, **hyperparameters: Any) -> fine_tuning_job_pb2.FineTuningJob:
        """Create a job on the registered model."""
        return await self.create_job(job_id, job_of(**hyperparameters))

    async def create_job(
        self, job_id: str, wanted: fine_tuning_job_pb2.FineTuningJob
    ) -> fine_tuning_job_pb2.FineTuningJob:
        """Create this very job."""
        request = training_service_pb2.CreateFineTuningJobRequest(
            parent=PARENT, fine_tuning_job_id=job_id, fine_tuning_job=wanted
        )
        job: fine_tuning_job_pb2.FineTuningJob = await self.jobs.CreateFineTuningJob(
            request, metadata=self.metadata
        )
        return job

    async def watch(self, name: str) -> AsyncGenerator[event_pb2.Event, None]:
        """Follow a job."""
        request = training_service_pb2.WatchFineTuningJobRequest(name=name)
        async for event in self.jobs.WatchFineTuningJob(request, metadata=self.metadata):
            yield event

    async def ended(self, name: str) -> fine_tuning_job_pb2.FineTuningJob:
        """Wait for a job's end."""
        async for _ in self.watch(name):
            pass
        request = training_service_pb2.GetFineTuningJobRequest(name=name)
        job: fine_tuning_job_pb2.FineTuningJob = await self.jobs.GetFineTuningJob(
            request, metadata=self.metadata
        )
        return job

    async def checkpoints(self, name: str) -> list[fine_tuning_job_pb2.Checkpoint]:
        """All checkpoints of a job."""
        request = training_service_pb2.ListCheckpointsRequest(parent=name)
        return list((await self.jobs.ListCheckpoints(request, metadata=self.metadata)).checkpoints)

    async def metrics(self, name: str) -> list[Mapping[str, float]]:
        """Metrics of a job by step, less those that depend on the clock."""
        request = training_service_pb2.ReadFineTuningJobMetricsRequest(name=name)
        points = (await self.jobs.ReadFineTuningJobMetrics(request, metadata=self.metadata)).points
        return [
            {key: value for key, value in point.values.items() if key not in TIMED_METRICS}
            for point in points
        ]


def job_of(**hyperparameters: Any) -> fine_tuning_job_pb2.FineTuningJob:
    chosen = {"num_epochs": 2, "batch_tokens": 96, "learning_rate": 5e-3, **hyperparameters}
    return fine_tuning_job_pb2.FineTuningJob(
        base_model=MODEL,
        rendering=RENDERING,
        lora=fine_tuning_job_pb2.LoraConfig(rank=4),
        hyperparameters=fine_tuning_job_pb2.Hyperparameters(**chosen),
        checkpoint_interval_steps=3,
    )


async def stop_after_a_checkpoint(site: Site, name: str, **worker: Any) -> None:
    """Work until a job has its first checkpoint, and no further: training waits until it is stored."""
    stopping, stored = asyncio.Event(), threading.Event()
    begin = TaskContext.begin_checkpoint

    def held(context: TaskContext, *arguments: Any) -> None:
        begin(context, *arguments)
        stored.wait(30)

    with patch.object(TaskContext, "begin_checkpoint", held):
        async with site.worker(stopping, **worker):
            await has_a_checkpoint(site, name)
            stopping.set()
            stored.set()


async def has_a_checkpoint(site: Site, name: str) -> None:
    async for event in site.watch(name):
        if event.WhichOneof("payload") == "checkpoint":
            return


@pytest.fixture(scope="module")
def children() -> Iterator[Children]:
    """What starts the processes of ranks, of one thread each, as a worker does."""
    setup = Setup(device="cpu", num_threads=1, log_level="INFO")
    program = Program(command=("-P", "-m", "luthier.training.worker.child"), setup=setup)
    with Children(program) as made:
        yield made


@pytest.fixture(autouse=True)
def few_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Score few held-out tokens at the end of a job: token by token they take as long as all its steps."""
    monkeypatch.setattr(held_out, "NUM_TOKENS", 4)


@pytest.fixture
def model_folder(
    request: pytest.FixtureRequest, tmp_path: Path, tiny_llama: Callable[..., PreTrainedModel]
) -> Path:
    """A model as files; a parameter is how many layers it has."""
    folder = tmp_path / "home" / "models" / "tiny"
    tiny_llama(num_layers=getattr(request, "param", 2)).save_pretrained(folder)
    vocabulary = {f"w{number}": number for number in range(97)}
    words = Tokenizer(WordLevel(vocabulary, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2")  # type: ignore[no-untyped-call]
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
async def site(tmp_path: Path, token_rows: Callable[..., list[Any]]) -> AsyncIterator[Site]:
    data = SmallDataService(token_rows(40))  # type: ignore[abstract]  # the methods that training uses
    server = grpc.aio.server()
    data_service_pb2_grpc.add_DataServiceServicer_to_server(data, server)
    hold_service_pb2_grpc.add_HoldServiceServicer_to_server(HoldsOfAnyone(), server)
    data_address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    home = tmp_path / "home"
    config = Config(
        home=home,
        log_level="INFO",
        projects=("default",),
        data_address=data_address,
        training_address="127.0.0.1:0",
        reward_addresses=("127.0.0.1",),
        metrics_address="127.0.0.1:0",
        **service_urls(home, "training"),
    )
    async with hosting(settings_of(config), lambda parts: build(parts, config), open_stores) as port:
        address = f"127.0.0.1:{port}"
        async with grpc.aio.insecure_channel(address) as wire:
            yield Site(
                home=home,
                address=address,
                data_address=data_address,
                data=data,
                models=model_service_pb2_grpc.ModelServiceStub(wire),
                jobs=training_service_pb2_grpc.TrainingServiceStub(wire),
                metadata=(("authorization", f"Bearer {read_or_create_keys(home).api_key}"),),
            )
    await server.stop(None)
