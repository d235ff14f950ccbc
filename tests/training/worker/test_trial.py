"""Before its first step a job has passes that fit: tried, kept with the job, and the same in every attempt."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import torch
from tests.stores import service_urls
from tests.training.recipes.prompt_runs import Run
from tests.training.recipes.test_preference import CPU, OPTIMISER
from tests.training.recipes.test_sft import corpus_of, settings_for
from tests.training.worker.conftest import Site
from transformers import PreTrainedModel

from luthier.errors.status import status_to_failure
from luthier.lm.checkpointing import checkpointed_layers
from luthier.lm.kept import CHECKPOINTINGS
from luthier.lm.lora import LoraSpec, insert_lora
from luthier.lm.model_config import read_config
from luthier.lm.readouts import FusedLoss
from luthier.lm.shape import shape_of
from luthier.training.fitting import fit_of, rows_of, trained_of
from luthier.training.recipe_settings import batch_settings
from luthier.training.recipes.batches import count_steps, plan_digest
from luthier.training.recipes.engine import Engine
from luthier.training.recipes.objectives import supervised
from luthier.training.recipes.trial import largest_batch, try_pass
from luthier.training.recipes.weights import Adapter, AllWeights
from luthier.training.worker import computing, trial
from luthier.v1.fine_tuning_job_pb2 import (
    ACTIVATION_CHECKPOINTING_FULL,
    ACTIVATION_CHECKPOINTING_NONE,
    ACTIVATION_CHECKPOINTING_SELECTIVE,
    SHARDING_FSDP2,
    FineTuningJob,
    RunRecord,
)
from luthier.v1.training_service_pb2 import GetFineTuningJobRequest

ModelMaker = Callable[..., PreTrainedModel]


class Memory:
    """What a machine is said to have, and what passes are said to take."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.limit = 0
        self.limits: list[int] = []
        """Of the first attempts, before that."""
        self.capacity: int | None = None
        """None: as much as is free."""
        self.taken: Callable[[], int] = lambda: 0
        self.tried: list[tuple[int, bool]] = []
        """Tokens of each pass that was tried, and whether its layers kept less than all."""
        monkeypatch.setattr(computing, "limit_bytes", lambda *_: self._free())
        monkeypatch.setattr(
            computing, "_capacity_bytes", lambda _: self.limit if self.capacity is None else self.capacity
        )
        monkeypatch.setattr(trial, "peak_bytes", lambda _: self.taken())

        def note(engine: Engine, batch: Any, trained: Any) -> None:
            layers = checkpointed_layers(engine.weights.model)
            self.tried.append((len(batch.input_ids), "forward" in layers[0].__dict__))
            try_pass(engine, batch, trained)

        monkeypatch.setattr(trial, "try_pass", note)

    def _free(self) -> int:
        return self.limits.pop(0) if self.limits else self.limit


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Memory:
    return Memory(monkeypatch)


@pytest.fixture
async def registered(site: Site, model_folder: Path) -> Site:
    async with site.worker():
        site.data.tokenizer_digest = (await site.register(model_folder)).tokenizer_digest
    return site


def expected_peaks(site: Site, job: FineTuningJob, model_folder: Path, size: int) -> dict[str, int]:
    """What passes of so many tokens are expected to take, by what layers keep."""
    corpus = corpus_of(site.data.rows)
    totals = count_steps(corpus.lengths("TRAIN"), batch_settings(job))
    held = sum(len(row.input_ids) for row in site.data.rows)
    longest = max(len(row.input_ids) for row in site.data.rows)
    rows = rows_of(job, totals, longest, held)
    trained = trained_of(job, shape_of(read_config(model_folder)))
    return {kept: fit_of(trained, rows, size, kept, "CPU", 0).footprint.peak for kept in CHECKPOINTINGS}


async def test_what_fits_is_tried_and_kept_before_the_first_step(registered: Site, memory: Memory) -> None:
    memory.limit = 64 << 30
    async with registered.worker():
        job = await registered.create("one", max_steps=2)
        records = []
        async for event in registered.watch(job.name):
            if event.HasField("metrics") and event.step == 1:
                records.append(await record_of(registered, job.name))
    ended = await registered.ended(job.name)
    assert ended.state == FineTuningJob.STATE_SUCCEEDED, ended.error
    assert not ended.hyperparameters.micro_batch_tokens, "what was left open stays so"
    for record in (records[0], ended.run_record):
        assert record.micro_batch_tokens == 4096
        assert record.activation_checkpointing == ACTIVATION_CHECKPOINTING_NONE
        assert record.memory.peak_bytes > record.memory.weights_bytes > 0
    assert len(memory.tried) == 1
    assert 48 < memory.tried[0][0] <= 96, "the largest step is one pass"


async def record_of(site: Site, name: str) -> RunRecord:
    job = await site.jobs.GetFineTuningJob(GetFineTuningJobRequest(name=name), metadata=site.metadata)
    record: RunRecord = job.run_record
    return record


async def test_a_trial_changes_no_bit(registered: Site, memory: Memory) -> None:
    async with registered.worker():
        tried = await registered.ended((await registered.create("tried")).name)
        kept = ACTIVATION_CHECKPOINTING_FULL
        said = await registered.ended(
            (await registered.create("said", micro_batch_tokens=4096, activation_checkpointing=kept)).name
        )
    assert [one[1] for one in memory.tried] == [False, True]
    assert await registered.metrics(tried.name) == await registered.metrics(said.name)
    assert [one.metrics for one in await registered.checkpoints(tried.name)] == [
        one.metrics for one in await registered.checkpoints(said.name)
    ]


@pytest.mark.parametrize("kind", ["adapter", "all", "all_bfloat16"])
def test_an_engine_is_as_it_was_before_a_trial(
    tiny_llama: ModelMaker, token_rows: Callable[..., list[Any]], kind: str
) -> None:
    corpus = corpus_of(token_rows(20))
    settings = settings_for(corpus)
    found = []
    for is_tried in (False, True):
        model = tiny_llama(torch.bfloat16 if kind == "all_bfloat16" else torch.float32)
        if kind == "adapter":
            insert_lora(model, LoraSpec(rank=4, alpha=8.0, dropout=0.3), seed=11)
            weights: Any = Adapter(model, "default", base_model="tiny")
        else:
            weights = AllWeights(model)
        engine = Engine(weights, OPTIMISER, CPU)
        if is_tried:
            config = {**model.config.to_dict(), "architectures": ["LlamaForCausalLM"]}
            job = FineTuningJob()
            if kind == "adapter":
                job.lora.rank = 4
            else:
                job.full.SetInParent()
            try_pass(engine, largest_batch(corpus, settings, 0, 0), trained_of(job, shape_of(config)))
        norms = []
        for _ in range(2):
            engine.accumulate(corpus.pack((0, 1, 2)), FusedLoss(), supervised(20))
            norms.append(engine.update(1e-2))
        found.append((norms, [one.clone() for one in engine.weights.parameters.values()]))
    (norms, plain), (others, after) = found
    assert norms == others
    assert all(map(torch.equal, plain, after))


def test_the_largest_pass_of_prompts_has_answers_as_long_as_they_may_be(tiny_llama: ModelMaker) -> None:
    run = Run(tiny_llama(), micro_batch_tokens=60)
    batch = largest_batch(run.corpus, run.settings, 6, 8)
    assert 60 - 16 < len(batch.input_ids) <= 60
    assert all(weight == 8 for weight in _sums(batch))


def _sums(batch: Any) -> Iterator[float]:
    for first, last in zip(batch.cu_seqlens, batch.cu_seqlens[1:], strict=False):
        yield float(batch.streams["weight"][first:last].sum())


# Of a few layers SELECTIVE saves no more than computing one of them again takes.
@pytest.mark.parametrize("model_folder", [6], indirect=True)
async def test_less_is_kept_where_memory_asks(registered: Site, memory: Memory, model_folder: Path) -> None:
    asked = {"micro_batch_tokens": 96, "max_steps": 1}
    async with registered.worker():
        first = await registered.ended((await registered.create("first", **asked)).name)
        peaks = expected_peaks(registered, first, model_folder, 96)
        chosen = []
        for kept in ("NONE", "SELECTIVE", "FULL"):
            memory.limit = round(peaks[kept] / 0.9) + 1
            ended = await registered.ended((await registered.create(f"with-{kept.lower()}", **asked)).name)
            assert ended.state == FineTuningJob.STATE_SUCCEEDED, ended.error
            chosen.append(ended.run_record.activation_checkpointing)
    assert peaks["NONE"] > peaks["SELECTIVE"] > peaks["FULL"]
    assert chosen == [
        ACTIVATION_CHECKPOINTING_NONE,
        ACTIVATION_CHECKPOINTING_SELECTIVE,
        ACTIVATION_CHECKPOINTING_FULL,
    ]


async def test_a_pass_that_takes_more_than_expected_gives_way_to_a_smaller_one(
    registered: Site, memory: Memory
) -> None:
    memory.limit = 64 << 30
    memory.taken = lambda: (128 << 30) if len(memory.tried) == 1 else 0
    async with registered.worker():
        job = await registered.create("one", max_steps=1)
        texts = [event.log.text async for event in registered.watch(job.name) if event.HasField("log")]
    ended = await registered.ended(job.name)
    assert ended.run_record.micro_batch_tokens == 2048
    assert len(memory.tried) == 2
    (warning,) = [text for text in texts if "it took 131,072 MiB, so that something smaller is tried" in text]
    assert warning.startswith(
        "passes of 4096 tokens with activation_checkpointing NONE are expected to take "
    )


async def test_torch_without_memory_gives_way_likewise(
    registered: Site, memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = [RuntimeError("DefaultCPUAllocator: can't allocate memory")]

    def fail(*arguments: Any) -> None:
        if failures:
            raise failures.pop()
        try_pass(*arguments)

    monkeypatch.setattr(trial, "try_pass", fail)
    memory.limit = 64 << 30
    async with registered.worker():
        ended = await registered.ended((await registered.create("one", max_steps=1)).name)
    assert ended.state == FineTuningJob.STATE_SUCCEEDED
    assert ended.run_record.micro_batch_tokens == 2048


async def test_what_does_not_fit_fails_before_the_first_step_and_says_what_would(
    registered: Site, memory: Memory
) -> None:
    memory.limit = 4 << 20
    async with registered.worker():
        ended = await registered.ended((await registered.create("one")).name)
    failure = status_to_failure(ended.error)
    assert failure.reason == "OUT_OF_MEMORY"
    assert "are expected to take" in failure.message
    for part in ("weights", "adapters", "gradients", "optimiser", "activations", "logits", "runtime"):
        assert f"{part} " in failure.message
    assert "no pass would: it needs a device of at least" in failure.message
    assert not memory.tried
    assert not await registered.metrics(ended.name)
    assert not ended.run_record.micro_batch_tokens


async def test_memory_that_others_hold_just_now_costs_an_attempt_and_not_the_job(
    registered: Site, memory: Memory
) -> None:
    memory.limits, memory.limit, memory.capacity = [4 << 20], 64 << 30, 64 << 30
    async with registered.worker():
        ended = await registered.ended((await registered.create("one", max_steps=2)).name)
        changes = [
            event.attempt_change
            async for event in registered.watch(ended.name)
            if event.HasField("attempt_change")
        ]
    assert ended.state == FineTuningJob.STATE_SUCCEEDED, ended.error
    assert [one.reason for one in changes if one.reason] == ["OUT_OF_MEMORY"]
    assert ended.num_attempts == 2


async def test_every_attempt_has_the_passes_of_the_first_or_fails(registered: Site, memory: Memory) -> None:
    stopping = asyncio.Event()
    memory.limit = 64 << 30
    async with registered.worker(stopping):
        job = await registered.create("one", num_epochs=60)
        async for event in registered.watch(job.name):
            if event.HasField("checkpoint"):
                stopping.set()
                break
    assert [tokens for tokens, _ in memory.tried] != []
    count = len(memory.tried)
    async with registered.worker(stopping := asyncio.Event()):
        async for event in registered.watch(job.name):
            if event.HasField("metrics") and event.attempt == 2:
                stopping.set()
                break
    assert len(memory.tried) == count, "what was chosen is not tried again"
    record = await record_of(registered, job.name)
    assert record.micro_batch_tokens == 4096
    memory.limit = 4 << 20
    async with registered.worker():
        ended = await registered.ended(job.name)
    failure = status_to_failure(ended.error)
    assert (ended.state, failure.reason) == (FineTuningJob.STATE_FAILED, "OUT_OF_MEMORY")
    assert "an earlier attempt chose them, and all have to keep to it" in failure.message
    assert failure.metadata["micro_batch_tokens"] == "4096"


async def test_what_is_chosen_is_no_part_of_a_run(registered: Site, memory: Memory) -> None:
    """A job of before, which says 4,096, goes on with its checkpoints, whatever is chosen of what it leaves open."""
    async with registered.worker():
        ended = await registered.ended((await registered.create("one", max_steps=3)).name)
        (point,) = await registered.checkpoints(ended.name)
    states = _states(registered.home)
    assert states
    state = json.loads(states[0].read_text())
    corpus = corpus_of(registered.data.rows)
    batches = batch_settings(ended)
    assert batches.micro_batch_tokens == 0
    assert state["settings"]["batches"]["micro_batch_tokens"] == 0
    assert state["plan_digest"] == plan_digest(corpus.lengths("TRAIN"), corpus.lengths("VALIDATION"), batches)
    assert point.step == 3


def _states(home: Path) -> list[Path]:
    blobs = Path(unquote(urlsplit(service_urls(home, "training")["blobs_url"]).path))
    return [path for path in blobs.rglob("*") if path.is_file() and _is_state(path)]


def _is_state(path: Path) -> bool:
    try:
        return path.read_bytes().startswith(b'{"best_step"')
    except OSError:
        return False


def test_of_a_model_that_ranks_divide_small_blocks_alone_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, ...]] = []

    def kept(*largest_bytes: int) -> AbstractContextManager[None]:
        asked.append(largest_bytes)
        return nullcontext()

    monkeypatch.setattr(computing, "freed_memory_kept", kept)
    computing._memory_kept(FineTuningJob())
    computing._memory_kept(FineTuningJob(sharding=SHARDING_FSDP2))
    assert asked == [(), (1 << 19,)]
