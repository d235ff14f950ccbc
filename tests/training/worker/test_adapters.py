"""Adapters of other kinds than plain LoRA by a worker of a real Training service: DoRA, and LoRA+'s rates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tests.training.worker.conftest import PARENT, Site, job_of, stop_after_a_checkpoint
from tests.training.worker.test_weights import downloaded, ended, going_on
from torch import Tensor
from transformers import AutoModelForCausalLM

from luthier.lm.adapter_files import load_adapter
from luthier.lm.lora import use_adapter
from luthier.v1.fine_tuning_job_pb2 import FineTuningJob, LoraConfig
from luthier.v1.model_pb2 import Model

# peft 0.21 still calls what transformers 5 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
IDS = torch.tensor([[5, 9, 11, 40, 3, 17, 60, 2]])
TARGETS = ("q_proj", "down_proj")
NUM_MODULES = 4
"""Both targets in each of the model's two layers."""
RATIO = 16.0


def adapter_job(lora: dict[str, Any], **hyperparameters: Any) -> FineTuningJob:
    job = job_of(**{"learning_rate": 2e-2, **hyperparameters})
    job.lora.CopyFrom(LoraConfig(rank=4, target_modules=TARGETS, **lora))
    return job


async def registered(site: Site, folder: Path) -> None:
    site.data.tokenizer_digest = (await site.register(folder)).tokenizer_digest


async def files_of(site: Site, job: FineTuningJob, folder: Path) -> dict[str, Tensor]:
    """The tensors of a job's adapter, which `folder` has afterwards."""
    return load_file(await downloaded(site, job.tuned_model, folder) / "adapter_model.safetensors")


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found


def loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def lengths_of(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in weights.items() if "lora_magnitude_vector" in key}


async def test_a_job_with_dora_learns_lengths_of_rows_that_peft_reads_and_a_merge_keeps(
    site: Site, model_folder: Path, tmp_path: Path
) -> None:
    async with site.worker():
        await registered(site, model_folder)
        job = await ended(site, "one", adapter_job({"use_dora": True}))
        plain = await ended(site, "plain", adapter_job({}))
        merged = await site.merge(job.tuned_model, "merged")
    assert job.lora.use_dora
    assert merged.state == Model.STATE_READY, merged.error
    weights = await files_of(site, job, tmp_path / "one")
    config = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    assert (config["use_dora"], config["r"]) == (True, 4)
    begun = load_file(model_folder / "model.safetensors")
    lengths = lengths_of(weights)
    assert len(lengths) == NUM_MODULES
    for key, learnt in lengths.items():
        module = key.removeprefix("base_model.model.").removesuffix(".lora_magnitude_vector")
        norms = begun[f"{module}.weight"].float().norm(dim=1)
        assert learnt.shape == norms.shape
        assert (learnt.float() - norms).abs().max() > 1e-3, f"{module}: its lengths have learnt nothing"
    assert not lengths_of(await files_of(site, plain, tmp_path / "plain"))

    untouched = logits(loaded(model_folder))
    theirs = logits(PeftModel.from_pretrained(loaded(model_folder), str(tmp_path / "one")))
    ours = loaded(model_folder)
    load_adapter(ours, tmp_path / "one", "one")
    with use_adapter(ours, "one"):
        torch.testing.assert_close(logits(ours), theirs, rtol=1e-4, atol=1e-4)
    effect = (theirs - untouched).norm()
    assert effect > 0.1
    whole = logits(loaded(await downloaded(site, merged.name, tmp_path / "merged")))
    assert (whole - theirs).norm() < 0.3 * effect


async def test_a_dora_adapter_is_gone_on_with_from_where_it_stands(
    site: Site, model_folder: Path, tmp_path: Path
) -> None:
    async with site.worker():
        await registered(site, model_folder)
        first = await ended(site, "one", adapter_job({"use_dora": True}, max_steps=3))
        second = await ended(site, "two", going_on(first.tuned_model))
    assert second.lora.use_dora
    one, two = [await files_of(site, job, tmp_path / job.name[-3:]) for job in (first, second)]
    assert len(lengths_of(one)) == NUM_MODULES
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one), "a rate of 1e-30 moves nothing"


async def test_with_lora_plus_the_factors_b_go_so_many_times_as_far(
    site: Site, model_folder: Path, tmp_path: Path
) -> None:
    """Adam's first step is as long as the rate, whatever the gradient: B, which begins at 0, is that step."""
    async with site.worker():
        await registered(site, model_folder)
        jobs = [
            await ended(site, name, adapter_job(lora, max_steps=1, learning_rate=1e-4))
            for name, lora in (("plain", {}), ("quick", {"lora_plus_ratio": RATIO}))
        ]
    assert jobs[1].lora.lora_plus_ratio == RATIO
    plain, quick = [await files_of(site, job, tmp_path / job.name.rsplit("/", 1)[-1]) for job in jobs]
    b_factors = [key for key in plain if ".lora_B" in key]
    assert len(b_factors) == NUM_MODULES
    for key in b_factors:
        assert plain[key].abs().max() > 0
        torch.testing.assert_close(quick[key], RATIO * plain[key], rtol=1e-4, atol=1e-9)
    others = plain.keys() - set(b_factors)
    assert len(others) == NUM_MODULES
    assert all(torch.equal(quick[key], plain[key]) for key in others), "only B is hastened"


@pytest.mark.parametrize("lora", [{"use_dora": True}, {"lora_plus_ratio": RATIO}], ids=["DoRA", "LoRA+"])
async def test_a_run_that_is_stopped_ends_with_the_same_bits(
    site: Site, model_folder: Path, lora: dict[str, Any]
) -> None:
    wanted = adapter_job(lora, learning_rate=5e-3)
    async with site.worker():
        await registered(site, model_folder)
        plain = await ended(site, "plain", adapter_job({}, learning_rate=5e-3))
        whole = await ended(site, "whole", wanted)
    broken = await site.create_job("broken", wanted)
    await stop_after_a_checkpoint(site, broken.name)
    async with site.worker():
        again = await site.ended(broken.name)
    assert (again.state, again.num_attempts) == (FineTuningJob.STATE_SUCCEEDED, 2), again.error
    metrics = await site.metrics(whole.name)
    assert await site.metrics(broken.name) == metrics
    assert metrics[-1]["train_loss"] != (await site.metrics(plain.name))[-1]["train_loss"]
    digests = [
        [(one.step, one.digest) for one in await site.checkpoints(f"{PARENT}/fineTuningJobs/{name}")]
        for name in ("whole", "broken")
    ]
    assert digests[0] == digests[1]
