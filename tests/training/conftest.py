"""A tiny random model with rows for it, and the Training service's inside on a real database."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from prometheus_client import CollectorRegistry
from tests.stores import database_url, open_blobs, open_database
from tests.training.crew import Crew
from tests.work.keepers import MemoryKeeper
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from luthier.errors import NotFound
from luthier.lm.attention import IMPLEMENTATION
from luthier.storage.blobs import BlobStore
from luthier.storage.database import Database
from luthier.storage.migrations import upgrade
from luthier.stored.v1.training_pb2 import ModelPrivate
from luthier.training import schema
from luthier.training.jobs.checkpoint_models import CheckpointModels
from luthier.training.jobs.handler import TrainHandler
from luthier.training.jobs.planning import SplitLengths
from luthier.training.jobs.service import JobService, Outside
from luthier.training.models import repository
from luthier.training.models.making import ModelMaking
from luthier.training.models.service import ModelService
from luthier.training.models.servicer import RegisterModelHandler
from luthier.training.models.tasks import KINDS, MakingHandler
from luthier.training.recipes.batches import RowLength
from luthier.training.recipes.survey import PackedLengths
from luthier.training.weights import StoredModel
from luthier.v1.dataset_pb2 import SPLIT_TRAIN, SPLIT_VALIDATION, Split
from luthier.v1.fine_tuning_job_pb2 import FineTuningJob, FineTuningPlan
from luthier.v1.model_pb2 import Model, ModelFile
from luthier.v1.model_service_pb2 import RegisterBaseModelRequest
from luthier.v1.rendering_pb2 import LengthStatistics, Rendering, RenderingSplitStatistics
from luthier.v1.training_service_pb2 import CreateFineTuningJobRequest, PlanFineTuningJobRequest
from luthier.work import schema as work_schema
from luthier.work.elsewhere import Elsewhere
from luthier.work.keeping import Keeping
from luthier.work.log import EventLog
from luthier.work.metrics import WorkMetrics
from luthier.work.queue import Queue
from luthier.work.rewards import RewardAddresses
from luthier.work.tasks import Task, TaskKind
from luthier.work.webhooks.targets import Targets
from luthier.worker.v1 import task_pb2

VOCABULARY = 97


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads that wait for one another on a busy machine cost more than such small models take."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRow:
    """One row of a rendering: tokens, and which of them are learnt."""

    row: int
    split: str
    input_ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]
    unit: int | None = None
    role: str = ""
    record: str = ""


@pytest.fixture
def tiny_llama() -> Callable[..., PreTrainedModel]:
    """Makes a model, of two layers by default; equal arguments give equal weights."""

    def make(
        dtype: torch.dtype = torch.float32,
        attention: str = IMPLEMENTATION,
        vocab_size: int = VOCABULARY,
        num_layers: int = 2,
    ) -> PreTrainedModel:
        config = LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=num_layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
            initializer_range=0.1,
        )
        config._attn_implementation = attention
        with torch.random.fork_rng():
            torch.manual_seed(7)
            model = LlamaForCausalLM(config)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        return model

    return make


@pytest.fixture
def token_rows() -> Callable[..., list[TokenRow]]:
    """Makes rows that can be learnt: 3 to 12 tokens of noise, then as many of a fixed song, supervised."""

    def make(count: int, *, seed: int = 0, validation_every: int = 5) -> list[TokenRow]:
        draw = random.Random(seed)
        rows = []
        for row in range(count):
            noise = tuple(draw.randrange(3, 20) for _ in range(draw.randint(3, 12)))
            split = "VALIDATION" if row % validation_every == validation_every - 1 else "TRAIN"
            song = tuple(30 + place % 3 for place in range(len(noise)))
            mask = (False,) * len(noise) + (True,) * len(song)
            rows.append(TokenRow(row=row, split=split, input_ids=noise + song, loss_mask=mask))
        return rows

    return make


def rows_of_units(count: int, *roles: str) -> list[TokenRow]:
    """Units of two rows of one prompt: the first answers with a song, the second with noise."""
    draw = random.Random(0)
    rows: list[TokenRow] = []
    for number in range(count):
        prompt = tuple(draw.randrange(3, 20) for _ in range(draw.randint(3, 8)))
        song = tuple(30 + place % 3 for place in range(draw.randint(3, 6)))
        noise = tuple(draw.randrange(40, 90) for _ in range(draw.randint(3, 6)))
        split = "VALIDATION" if number % 5 == 4 else "TRAIN"
        unit = len(rows)
        for role, answer in zip(roles, (song, noise), strict=True):
            mask = (False,) * len(prompt) + (True,) * len(answer)
            rows.append(
                TokenRow(
                    row=len(rows),
                    split=split,
                    input_ids=prompt + answer,
                    loss_mask=mask,
                    unit=unit,
                    role=role,
                )
            )
    return rows


def prompt_rows(count: int) -> list[TokenRow]:
    """Prompts of random words; the record of each says how many."""
    draw = random.Random(0)
    rows = []
    for row in range(count):
        ids = tuple(draw.randrange(3, 97) for _ in range(draw.randint(1, 8)))
        rows.append(
            TokenRow(
                row=row,
                split="VALIDATION" if row % 5 == 4 else "TRAIN",
                input_ids=ids,
                loss_mask=(False,) * len(ids),
                unit=row,
                role="prompt",
                record=f'{{"words": {len(ids)}}}',
            )
        )
    return rows


class MemoryRenderings:
    """Renderings held in memory."""

    def __init__(self) -> None:
        self.views: dict[str, Rendering] = {}
        self.rows: dict[str, SplitLengths] = {}

    async def get(self, name: str) -> Rendering:
        if name not in self.views:
            raise NotFound(f"{name} does not exist", metadata={"name": name})
        return self.views[name]

    async def lengths(self, name: str) -> SplitLengths:
        return self.rows[name]

    async def place(self, name: str, row: int) -> str:
        return f"{name.rpartition('/')[2]}.jsonl:{row + 1}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """The Training service's inside on a real database, with a registered model and a rendering."""

    database: Database
    blobs: BlobStore
    log: EventLog
    queue: Queue
    models: ModelService
    jobs: JobService
    checkpoints: CheckpointModels
    making: ModelMaking
    renderings: MemoryRenderings
    keeper: MemoryKeeper
    elsewhere: Elsewhere
    crew: Crew
    folder: Path

    PARENT: ClassVar[str] = "projects/default"
    MODEL: ClassVar[str] = "projects/default/models/tiny"
    RENDERING: ClassVar[str] = "projects/default/renderings/songs"

    def request(self, **changes: Any) -> FineTuningJob:
        """A job on the bench's model and rendering."""
        return FineTuningJob(**{"base_model": self.MODEL, "rendering": self.RENDERING, **changes})

    async def create(self, job_id: str, **changes: Any) -> FineTuningJob:
        """Create a job on the bench's model and rendering."""
        return await self.jobs.create(
            CreateFineTuningJobRequest(
                parent=self.PARENT, fine_tuning_job_id=job_id, fine_tuning_job=self.request(**changes)
            )
        )

    async def plan(self, **changes: Any) -> FineTuningPlan:
        """Plan a job on the bench's model and rendering."""
        request = PlanFineTuningJobRequest(parent=self.PARENT, fine_tuning_job=self.request(**changes))
        return await self.jobs.plan(request)

    async def job(self, name: str) -> FineTuningJob:
        """Read a job."""
        return (await self.jobs.family.read(name)).message

    async def cancel(self, name: str, etag: str = "") -> FineTuningJob:
        """Ask a job to stop."""
        return await self.jobs.family.cancel(name, etag)

    async def register(self, model_id: str, model: Model) -> Model:
        """Register a base model."""
        request = RegisterBaseModelRequest(parent=self.PARENT, model_id=model_id, model=model)
        return await self.models.register(request)

    async def model(self, name: str) -> Model:
        """Read a model."""
        return (await self.models.family.read(name)).message

    async def add_model(self, name: str = MODEL, **changes: Any) -> StoredModel:
        """Store a READY base model with two small files."""
        weights = await self.blobs.put_bytes(b"weights of " + name.encode())
        tokenizer = await self.blobs.put_bytes(b"tokenizer")
        model = {
            "name": name,
            "state": Model.STATE_READY,
            "kind": Model.KIND_BASE,
            "digest": "d" * 64,
            "tokenizer_digest": "t" * 64,
            "architecture": "LlamaForCausalLM",
            "context_length": 64,
        }
        private = ModelPrivate(
            files=[
                ModelFile(path="model.safetensors", sha256=weights.digest, size_bytes=weights.size_bytes),
                ModelFile(
                    path="tokenizer.json",
                    sha256=tokenizer.digest,
                    size_bytes=tokenizer.size_bytes,
                    tokenizer=True,
                ),
            ]
        )
        async with self.database.transaction() as connection:
            return await repository.models().insert(connection, Model(**{**model, **changes}), private)

    def add_rendering(self, name: str = RENDERING, **changes: Any) -> Rendering:
        """Know a READY rendering of 20 training rows of 10 tokens and 5 validation rows."""
        rendering = {"name": name, "state": Rendering.STATE_READY, "digest": "r" * 64}
        rendering["tokenizer_digest"] = "t" * 64
        self.know(Rendering(**{**rendering, **changes}), lengths_of(20, 10), lengths_of(5, 10, first=20))
        return self.renderings.views[name]

    def know(
        self, rendering: Rendering, train: tuple[RowLength, ...], validation: tuple[RowLength, ...]
    ) -> None:
        """Know a rendering with these rows."""
        self.renderings.views[rendering.name] = with_counts(rendering, train, validation)
        self.renderings.rows[rendering.name] = SplitLengths(
            train=PackedLengths.of(train), validation=PackedLengths.of(validation)
        )

    async def claim(self, kind: TaskKind = TaskKind.TRAIN) -> tuple[Task, task_pb2.Task]:
        """Lease the oldest task."""
        claimed = await self.queue.claim("worker@1", [kind], 0.0)
        assert claimed is not None
        return claimed

    async def states(self, name: str) -> list[str]:
        """States that a resource's events tell of, in order."""
        async with self.database.reading() as connection:
            family: Any = self.jobs.family if "/fineTuningJobs/" in name else self.models.family
            uid = (await family.get(connection, name)).uid
            events = await self.log.read(connection, uid, 1, 1000)
        return [event.state_change.state for event in events if event.HasField("state_change")]


def with_counts(
    rendering: Rendering, train: tuple[RowLength, ...], validation: tuple[RowLength, ...]
) -> Rendering:
    """A rendering whose statistics are those of these rows; what it says of dropped and cut records stays."""
    counted = Rendering()
    counted.CopyFrom(rendering)
    del counted.split_statistics[:]
    for split, rows in ((SPLIT_TRAIN, train), (SPLIT_VALIDATION, validation)):
        before = next((one for one in rendering.split_statistics if one.split == split), None)
        counted.split_statistics.append(_counts_of(split, rows, before or RenderingSplitStatistics()))
    return counted


def _counts_of(
    split: Split.ValueType, rows: tuple[RowLength, ...], before: RenderingSplitStatistics
) -> RenderingSplitStatistics:
    lengths = [row.num_tokens for row in rows]
    return RenderingSplitStatistics(
        split=split,
        tokens=LengthStatistics(count=len(rows), sum=sum(lengths), maximum=max(lengths, default=0)),
        supervised_tokens=LengthStatistics(count=len(rows), sum=sum(row.num_supervised for row in rows)),
        num_dropped=before.num_dropped,
        num_truncated=before.num_truncated,
        num_unsupervised=sum(row.num_supervised == 0 for row in rows),
        num_units=before.num_units,
        longest_unit_tokens=before.longest_unit_tokens,
        roles=before.roles,
    )


def lengths_of(count: int, num_tokens: int, *, first: int = 0) -> tuple[RowLength, ...]:
    """Rows of equal length, half of each learnt."""
    return tuple(
        RowLength(row=row, num_tokens=num_tokens, num_supervised=num_tokens // 2)
        for row in range(first, first + count)
    )


async def stored(bench: Bench, text: str, path: str = "a") -> task_pb2.BlobFile:
    """Store a text as a blob; return it as a checkpoint's file."""
    blob = await bench.blobs.put_bytes(text.encode())
    return task_pb2.BlobFile(path=path, sha256=blob.digest, size_bytes=blob.size_bytes)


async def adapter_files(bench: Bench, config: str = "{config}") -> list[task_pb2.BlobFile]:
    """Store what a worker brings of an adapter."""
    files = {"adapter_config.json": config, "adapter_model.safetensors": "factors"}
    return [await stored(bench, text, path) for path, text in files.items()]


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    """The service's inside; the model and the rendering of its constants are there."""
    url = database_url(tmp_path / "training")
    await asyncio.to_thread(upgrade, url, [work_schema.MIGRATIONS, schema.MIGRATIONS])
    database = open_database(tmp_path / "training")
    blobs, log = open_blobs(tmp_path / "blobs"), EventLog(database, heartbeat_seconds=0.2)
    queue = Queue(database, log, WorkMetrics(CollectorRegistry(), tuple(TaskKind)))
    models = ModelService(database, log, queue, blobs, Keeping())
    elsewhere = Elsewhere(database, {"renderings": (keeper := MemoryKeeper())})
    crew, rewards = Crew(), RewardAddresses(["127.0.0.1", "[::1]:7"])
    away: Any = {"elsewhere": elsewhere, "rewards": rewards, "webhooks": Targets(["127.0.0.1"])}
    outside = Outside(renderings=(renderings := MemoryRenderings()), workers=crew, **away)
    jobs = JobService(database, log, queue, models, outside, blobs, Keeping())
    training = (jobs.family, log, models, blobs, jobs.rollouts)
    queue.register(TaskKind.TRAIN, TrainHandler(*training))
    queue.register(TaskKind.REGISTER_MODEL, RegisterModelHandler(models))
    making = ModelMaking(database, models, checkpoints := CheckpointModels(database, models, jobs.family))
    for kind in KINDS:
        queue.register(kind, MakingHandler(models, making))
    made = Bench(
        database=database,
        blobs=blobs,
        log=log,
        queue=queue,
        models=models,
        jobs=jobs,
        checkpoints=checkpoints,
        making=making,
        renderings=renderings,
        keeper=keeper,
        elsewhere=elsewhere,
        crew=crew,
        folder=tmp_path,
    )
    await made.add_model()
    made.add_rendering()
    yield made
    await database.close()
