"""Every method by a worker of a real Training service: what it measures, what it leaves, and how it goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tests.training.conftest import rows_of_units
from tests.training.worker.conftest import MODEL, Site, job_of, stop_after_a_checkpoint
from tests.training.worker.test_weights import downloaded, ended, model_of
from transformers import AutoModelForSequenceClassification

from luthier.v1.fine_tuning_job_pb2 import (
    LEARNING_RATE_SCHEDULE_CONSTANT,
    FineTuningJob,
    FullConfig,
    PreferenceConfig,
    RewardModelConfig,
    Selection,
)
from luthier.v1.model_pb2 import Model
from luthier.v1.rendering_pb2 import RENDERING_KIND_PREFERENCE, RENDERING_KIND_UNPAIRED

Loss = PreferenceConfig.Loss


@pytest.fixture
def pairs(site: Site) -> Site:
    """The site, whose rendering holds pairs."""
    site.data.rows = rows_of_units(30, "chosen", "rejected")
    site.data.kind = RENDERING_KIND_PREFERENCE
    return site


async def registered(site: Site, folder: Path) -> None:
    site.data.tokenizer_digest = (await site.register(folder)).tokenizer_digest


def preference(loss: Loss.ValueType = Loss.LOSS_UNSPECIFIED, **changes: Any) -> FineTuningJob:
    job = job_of(**{"batch_rows": 6, "batch_tokens": None, "learning_rate": 2e-3, "num_epochs": 3, **changes})
    job.preference.CopyFrom(PreferenceConfig(loss=loss))
    return job


@pytest.mark.parametrize("loss", [Loss.LOSS_DPO, Loss.LOSS_IPO, Loss.LOSS_ORPO, Loss.LOSS_SIMPO])
async def test_the_chosen_answers_become_likelier_than_the_rejected_ones(
    pairs: Site, model_folder: Path, loss: Loss.ValueType
) -> None:
    async with pairs.worker():
        await registered(pairs, model_folder)
        job = await ended(pairs, "one", preference(loss))
    metrics = await pairs.metrics(job.name)
    assert metrics[-1]["train_loss"] < metrics[0]["train_loss"]
    assert metrics[-1]["validation_reward_accuracy"] > 0.8
    assert metrics[-1]["validation_reward_margin"] > 0
    if loss == Loss.LOSS_DPO:
        # Before the first step the model is its own reference.
        assert metrics[0]["reward_margin"] == pytest.approx(0.0, abs=1e-6)
        assert metrics[0]["train_loss"] == pytest.approx(0.6931, abs=1e-4)
    model = await model_of(pairs, job)
    assert (model.kind, model.base_model) == (Model.KIND_ADAPTER, MODEL)


async def test_kto_learns_from_labelled_answers(site: Site, model_folder: Path) -> None:
    good, bad = (rows_of_units(30, role, "mismatched") for role in ("desirable", "undesirable"))
    site.data.rows = [
        row for number in range(30) for row in (good if number % 2 else bad)[2 * number : 2 * number + 2]
    ]
    site.data.kind = RENDERING_KIND_UNPAIRED
    async with site.worker():
        await registered(site, model_folder)
        job = await ended(site, "one", preference(Loss.LOSS_KTO))
    metrics = await site.metrics(job.name)
    assert metrics[-1]["train_loss"] < metrics[0]["train_loss"]
    assert {"kl", "reward_chosen", "reward_rejected"} <= metrics[0].keys()
    assert "validation_kl" in metrics[-1]


async def test_an_adapter_is_compared_with_the_adapter_that_it_began_as(
    pairs: Site, model_folder: Path
) -> None:
    """Also by a worker that goes on where another stopped."""
    async with pairs.worker():
        await registered(pairs, model_folder)
        first = await ended(pairs, "one", preference())
        again = preference()
        again.ClearField("adaptation")
        again.start_from = first.tuned_model
        whole = await ended(pairs, "whole", again)
    broken = await pairs.create_job("broken", again)
    await stop_after_a_checkpoint(pairs, broken.name)
    async with pairs.worker():
        resumed = await pairs.ended(broken.name)
    metrics = await pairs.metrics(whole.name)
    assert metrics[0]["reward_margin"] == pytest.approx(0.0, abs=1e-5), "not the base model"
    assert (await pairs.metrics(first.name))[-1]["reward_margin"] > 0.01
    assert resumed.num_attempts == 2
    assert await pairs.metrics(broken.name) == metrics
    assert await digests(pairs, broken) == await digests(pairs, whole)


async def test_all_weights_are_compared_with_what_they_were_also_after_a_stop(
    pairs: Site, model_folder: Path
) -> None:
    wanted = preference()
    wanted.full.CopyFrom(FullConfig())
    async with pairs.worker():
        await registered(pairs, model_folder)
        whole = await ended(pairs, "whole", wanted)
    broken = await pairs.create_job("broken", wanted)
    await stop_after_a_checkpoint(pairs, broken.name)
    async with pairs.worker():
        assert (await pairs.ended(broken.name)).num_attempts == 2
    metrics = await pairs.metrics(whole.name)
    # Rounded otherwise in other batches, in bfloat16.
    assert metrics[0]["reward_margin"] == pytest.approx(0.0, abs=1e-3)
    assert metrics[-1]["reward_margin"] > 0.01
    assert await pairs.metrics(broken.name) == metrics
    assert await digests(pairs, broken) == await digests(pairs, whole)


# peft 0.21 still calls what transformers 5 has renamed.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("full", [False, True])
async def test_a_reward_model_is_a_sequence_classifier_in_transformers(
    pairs: Site, model_folder: Path, tmp_path: Path, *, full: bool
) -> None:
    wanted = preference(learning_rate=1e-2, num_epochs=6)
    wanted.reward_model.CopyFrom(RewardModelConfig())
    if full:
        wanted.full.CopyFrom(FullConfig())
    async with pairs.worker():
        await registered(pairs, model_folder)
        job = await ended(pairs, "one", wanted)
    metrics = await pairs.metrics(job.name)
    assert metrics[-1]["validation_reward_accuracy"] > 0.9
    model = await model_of(pairs, job)
    assert (model.kind, bool(model.base_model)) == (Model.KIND_REWARD, not full)
    folder = await downloaded(pairs, model.name, tmp_path / "reward")
    if full:
        assert model.architecture == "LlamaForSequenceClassification"
        classifier: Any = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    else:
        base: Any = AutoModelForSequenceClassification.from_pretrained(
            model_folder, num_labels=1, dtype=torch.float32
        )
        classifier = PeftModel.from_pretrained(base, folder)
        assert json.loads((folder / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"
    for chosen, rejected in zip(pairs.data.rows[8::10], pairs.data.rows[9::10], strict=True):
        with torch.no_grad():
            values = [classifier(torch.tensor([row.input_ids])).logits.item() for row in (chosen, rejected)]
        assert values[0] > values[1]


async def test_the_best_checkpoint_becomes_the_model_and_a_job_ends_early(
    site: Site, model_folder: Path, tmp_path: Path
) -> None:
    """A rate that ruins the model after some steps: what came before is kept, and nothing more is tried."""
    wanted = job_of(num_epochs=50, learning_rate=0.3, learning_rate_schedule=LEARNING_RATE_SCHEDULE_CONSTANT)
    wanted.validation_interval_steps = 1
    wanted.checkpoint_interval_steps = 100
    wanted.max_checkpoints = 1
    wanted.selection.CopyFrom(Selection(patience=3, use_best=True))
    async with site.worker():
        await registered(site, model_folder)
        job = await ended(site, "one", wanted)
        logs = [event.log.text async for event in site.watch(job.name) if event.HasField("log")]
    assert (job.selection.metric, job.selection.direction) == ("validation_loss", Selection.DIRECTION_LOWER)
    losses = [point["validation_loss"] for point in await site.metrics(job.name)]
    best = min(range(len(losses)), key=losses.__getitem__) + 1
    assert job.best_step == best
    assert len(losses) == best + 3 < job.progress.total
    assert f"ended early: 3 validations since step {best} were not better" in logs
    steps = [one.step for one in await site.checkpoints(job.name)]
    assert steps == [best, best + 3]
    model = await model_of(site, job)
    assert model.step == best
    folder = await downloaded(site, model.name, tmp_path / "tuned")
    kept = await downloaded(site, f"{job.name}/checkpoints/step-{best}", tmp_path / "best")
    last = await downloaded(site, f"{job.name}/checkpoints/step-{best + 3}", tmp_path / "last")
    weights = [load_file(one / "adapter_model.safetensors") for one in (folder, kept, last)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not all(torch.equal(weights[0][name], weights[2][name]) for name in weights[0])


async def test_a_loss_that_is_not_finite_names_the_lines_of_its_rows(site: Site, model_folder: Path) -> None:
    async with site.worker():
        await registered(site, model_folder)
        wanted = job_of(learning_rate=1000.0, num_epochs=9)
        wanted.lora.alpha = 1e6
        job = await site.ended((await site.create_job("one", wanted)).name)
    assert job.state == FineTuningJob.STATE_FAILED
    assert "must be finite, got" in job.error.message
    assert "; the first of them are a.jsonl:" in job.error.message


async def digests(site: Site, job: FineTuningJob) -> list[tuple[int, str]]:
    return [(one.step, one.digest) for one in await site.checkpoints(job.name)]
