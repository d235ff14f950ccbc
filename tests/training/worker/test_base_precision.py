"""Adapters that are trained beside a base model in 8 or 4 bits, by a worker of a real Training service."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.training.conftest import prompt_rows, rows_of_units
from tests.training.worker.conftest import MODEL, Site, job_of, stop_after_a_checkpoint
from tests.training.worker.test_methods import digests, preference, registered
from tests.training.worker.test_reinforcement import reinforcement
from tests.training.worker.test_reward_models import JUDGE, judging
from tests.training.worker.test_reward_models import registered as with_pairs
from tests.training.worker.test_weights import downloaded, ended, model_of
from transformers import PreTrainedModel

from luthier.kernels.dequantise import is_quantised
from luthier.lm.load import load_model
from luthier.lm.precision import Precision
from luthier.training.recipes.engine import Engine
from luthier.training.worker import reward_models
from luthier.v1.base_precision_pb2 import (
    BASE_PRECISION_BFLOAT16,
    BASE_PRECISION_INT8,
    BASE_PRECISION_NF4,
    BasePrecision,
)
from luthier.v1.fine_tuning_job_pb2 import FineTuningJob, PreferenceConfig, RewardModelConfig
from luthier.v1.rendering_pb2 import (
    RENDERING_KIND_PREFERENCE,
    RENDERING_KIND_PROMPT,
    RENDERING_KIND_UNPAIRED,
)

QUANTISED = (BASE_PRECISION_INT8, BASE_PRECISION_NF4)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[PreTrainedModel]:
    """The models that engines train beside."""
    found: list[PreTrainedModel] = []
    real = Engine.__init__

    def init(engine: Engine, weights: Any, *arguments: Any) -> None:
        found.append(weights.model)
        real(engine, weights, *arguments)

    monkeypatch.setattr(Engine, "__init__", init)
    return found


def linears(model: PreTrainedModel) -> list[Any]:
    return [module for name, module in model.named_modules() if name.endswith("_proj")]


@pytest.mark.parametrize("precision", QUANTISED)
async def test_a_job_learns_beside_quantised_weights_and_goes_on_with_the_same_bits(
    site: Site, model_folder: Path, tmp_path: Path, seen: list[Any], precision: BasePrecision.ValueType
) -> None:
    wanted = job_of()
    wanted.base_precision = precision
    async with site.worker():
        await registered(site, model_folder)
        plain = await ended(site, "plain", job_of())
        whole = await ended(site, "whole", wanted)
    broken = await site.create_job("broken", wanted)
    await stop_after_a_checkpoint(site, broken.name)
    async with site.worker():
        resumed = await site.ended(broken.name)
    assert resumed.num_attempts == 2
    metrics, others = await site.metrics(whole.name), await site.metrics(plain.name)
    assert await site.metrics(broken.name) == metrics
    assert await digests(site, broken) == await digests(site, whole)
    assert metrics[-1]["train_loss"] < metrics[0]["train_loss"]
    assert metrics != others, "the weights were others"
    assert metrics[-1]["validation_loss"] == pytest.approx(others[-1]["validation_loss"], rel=0.1)
    first, *quantised_ones = seen
    assert not any(is_quantised(one.weight) for one in linears(first))
    for model in quantised_ones:
        assert all(is_quantised(one.weight) for one in linears(model))
    # What is left has the names and types of any adapter.
    folders = [
        await downloaded(site, job.tuned_model, tmp_path / str(number))
        for number, job in enumerate((plain, whole))
    ]
    forms = [
        {
            name: (one.shape, one.dtype)
            for name, one in load_file(folder / "adapter_model.safetensors").items()
        }
        for folder in folders
    ]
    assert forms[0] == forms[1]
    assert [(folder / "adapter_config.json").read_text() for folder in folders].count(
        (folders[0] / "adapter_config.json").read_text()
    ) == 2
    model = await model_of(site, whole)
    assert (model.base_model, model.base_precision) == (MODEL, precision)
    assert (await model_of(site, plain)).base_precision == BASE_PRECISION_BFLOAT16


@pytest.mark.parametrize("precision", QUANTISED)
@pytest.mark.parametrize("method", ["dpo", "kto", "reward_model", "grpo"])
async def test_every_method_learns_beside_quantised_weights(
    site: Site, model_folder: Path, seen: list[Any], method: str, precision: BasePrecision.ValueType
) -> None:
    wanted = prepared(site, method)
    wanted.base_precision = precision
    async with site.worker():
        await registered(site, model_folder)
        job = await ended(site, "one", wanted)
    metrics = await site.metrics(job.name)
    assert all(is_quantised(one.weight) for one in linears(seen[-1]))
    assert (await model_of(site, job)).base_precision == precision
    _improved(method, metrics)


def _improved(method: str, metrics: list[Mapping[str, float]]) -> None:
    match method:
        case "grpo":
            rewards = [point["reward_mean"] for point in metrics]
            assert sum(rewards[-10:]) > sum(rewards[:10])
        case "reward_model":
            assert metrics[-1]["validation_reward_accuracy"] > 0.8
        case _:
            assert metrics[-1]["train_loss"] < metrics[0]["train_loss"]
            assert metrics[0].get("reward_margin", 0.0) == pytest.approx(0.0, abs=1e-6), "its own reference"


def prepared(site: Site, method: str) -> FineTuningJob:
    """A job of a method, whose rows the site serves."""
    if method == "grpo":
        site.data.rows = prompt_rows(20)
        site.data.kind = RENDERING_KIND_PROMPT
        return reinforcement(steers={"num_epochs": 20})
    if method == "kto":
        good, bad = (rows_of_units(30, role, "mismatched") for role in ("desirable", "undesirable"))
        site.data.rows = [
            row for number in range(30) for row in (good if number % 2 else bad)[2 * number : 2 * number + 2]
        ]
        site.data.kind = RENDERING_KIND_UNPAIRED
    else:
        site.data.rows = rows_of_units(30, "chosen", "rejected")
        site.data.kind = RENDERING_KIND_PREFERENCE
    loss = PreferenceConfig.LOSS_KTO if method == "kto" else PreferenceConfig.LOSS_DPO
    wanted = preference(loss)
    if method == "reward_model":
        wanted.hyperparameters.learning_rate = 1e-2
        wanted.hyperparameters.num_epochs = 6
        wanted.reward_model.CopyFrom(RewardModelConfig())
    return wanted


async def test_a_reward_model_values_beside_what_it_was_trained_beside(
    site: Site,
    model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    token_rows: Callable[..., list[Any]],
) -> None:
    """In the model that trains, where both are held alike; else beside one of its own."""
    loaded: list[str] = []
    real = load_model

    def load(folder: Path, *, device: Any, precision: Any) -> PreTrainedModel:
        loaded.append(precision)
        return real(folder, device=device, precision=precision)

    monkeypatch.setattr(reward_models, "load_model", load)
    site.data.rows = prompt_rows(20)
    site.data.kind = RENDERING_KIND_PROMPT
    judge = judging()
    judge.base_precision = BASE_PRECISION_NF4
    wanted = reinforcement(JUDGE, steers={"num_epochs": 1})
    found = []
    async with site.worker():
        await with_pairs(site, model_folder, token_rows)
        await ended(site, "judge", judge)
        for number, precision in enumerate((BASE_PRECISION_NF4, BASE_PRECISION_BFLOAT16)):
            wanted.base_precision = precision
            await ended(site, f"job-{number}", wanted)
            found.append(list(loaded))
    assert found == [[], ["NF4"]]


async def test_an_adapter_is_gone_on_with_beside_what_it_was_trained_beside(
    site: Site, model_folder: Path, seen: list[Any]
) -> None:
    wanted = job_of(max_steps=3)
    wanted.base_precision = BASE_PRECISION_NF4
    async with site.worker():
        await registered(site, model_folder)
        first = await ended(site, "one", wanted)
        again = job_of(max_steps=3)
        again.ClearField("lora")
        again.start_from = first.tuned_model
        second = await ended(site, "two", again)
        again.base_precision = BASE_PRECISION_BFLOAT16
        third = await ended(site, "three", again)
    assert [job.base_precision for job in (first, second, third)] == [
        BASE_PRECISION_NF4,
        BASE_PRECISION_NF4,
        BASE_PRECISION_BFLOAT16,
    ]
    assert [is_quantised(linears(model)[0].weight) for model in seen] == [True, True, False]


@pytest.mark.parametrize("precision", ["INT8", "NF4"])
async def test_the_same_bytes_are_made_at_every_load(model_folder: Path, precision: Precision) -> None:
    """What a resumed run computes with is what it began with."""
    models: list[Any] = [load_model(model_folder, precision=precision) for _ in range(2)]
    for one, other in zip(*(map(linears, models)), strict=True):
        names = one.weight.__tensor_flatten__()[0]
        parts = [(getattr(one.weight, name), getattr(other.weight, name)) for name in names]
        assert all(torch.equal(*pair) for pair in parts if pair[0] is not None)
