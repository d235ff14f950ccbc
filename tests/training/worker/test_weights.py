"""All weights, and jobs that go on with what others tuned, by a worker of a real Training service."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sqlite3
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tests.stores import service_file
from tests.training.worker.conftest import MODEL, Site, job_of, stop_after_a_checkpoint
from transformers import AutoModelForCausalLM

from luthier.lm.adapter_files import load_adapter
from luthier.lm.load import load_model
from luthier.lm.lora import use_adapter
from luthier.stored.v1.training_pb2 import CheckpointPrivate
from luthier.v1 import fine_tuning_job_pb2, model_pb2, model_service_pb2
from luthier.v1.fine_tuning_job_pb2 import Checkpoint, FineTuningJob, FullConfig

BARELY = 1e-30
"""A learning rate that moves nothing."""


def full_job(**hyperparameters: Any) -> FineTuningJob:
    job = job_of(**hyperparameters)
    job.full.CopyFrom(FullConfig())
    return job


def going_on(start: str, **hyperparameters: Any) -> FineTuningJob:
    job = job_of(**{"max_steps": 1, "learning_rate": BARELY, **hyperparameters})
    job.ClearField("adaptation")
    job.base_model = ""
    job.start_from = start
    return job


async def ended(site: Site, job_id: str, wanted: FineTuningJob) -> FineTuningJob:
    job = await site.ended((await site.create_job(job_id, wanted)).name)
    assert job.state == FineTuningJob.STATE_SUCCEEDED, job.error
    return job


async def downloaded(site: Site, name: str, folder: Path) -> Path:
    """Put a model's files into a folder, as whoever downloads it does."""
    await asyncio.to_thread(folder.mkdir)
    listed = await site.models.ListModelFiles(
        model_service_pb2.ListModelFilesRequest(parent=name), metadata=site.metadata
    )
    for file in listed.files:
        request = model_service_pb2.DownloadModelFileRequest(name=name, path=file.path)
        pieces = site.models.DownloadModelFile(request, metadata=site.metadata)
        (folder / file.path).write_bytes(b"".join([piece.data async for piece in pieces]))
    return folder


async def model_of(site: Site, job: FineTuningJob) -> model_pb2.Model:
    request = model_service_pb2.GetModelRequest(name=job.tuned_model)
    model: model_pb2.Model = await site.models.GetModel(request, metadata=site.metadata)
    return model


async def test_all_weights_are_trained_and_load_in_transformers(
    site: Site, model_folder: Path, tmp_path: Path
) -> None:
    async with site.worker():
        base = await site.register(model_folder)
        site.data.tokenizer_digest = base.tokenizer_digest
        job = await ended(site, "one", full_job())
    metrics = await site.metrics(job.name)
    assert metrics[-1]["train_loss"] < metrics[0]["train_loss"]
    assert job.run_record.determinism == fine_tuning_job_pb2.DETERMINISM_BITWISE
    model = await model_of(site, job)
    assert (model.kind, model.num_parameters) == (model_pb2.Model.KIND_WEIGHTS, base.num_parameters)
    assert (model.tokenizer_digest, model.base_model, model.start_from) == (base.tokenizer_digest, "", MODEL)
    assert list(model.eos_token_ids) == list(base.eos_token_ids)
    folder = await downloaded(site, model.name, tmp_path / "tuned")
    tuned, before = load_file(folder / "model.safetensors"), load_file(model_folder / "model.safetensors")
    assert tuned.keys() == before.keys()
    assert all(not torch.equal(tuned[name].float(), before[name].float()) for name in tuned), "norms too"
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=torch.bfloat16)
    theirs, report = loaded
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    ids = torch.arange(5, 25).unsqueeze(0)
    ours = load_model(folder)
    with torch.no_grad():
        assert torch.allclose(ours(ids).logits.float(), theirs(ids).logits.float(), atol=0.05)


async def test_a_run_of_all_weights_that_is_stopped_ends_with_the_same_bits(
    site: Site, model_folder: Path
) -> None:
    async with site.worker():
        site.data.tokenizer_digest = (await site.register(model_folder)).tokenizer_digest
        whole = await ended(site, "whole", full_job())
    broken = await site.create_job("broken", full_job())
    await stop_after_a_checkpoint(site, broken.name)
    async with site.worker():
        again = await site.ended(broken.name)
    assert (again.state, again.num_attempts) == (FineTuningJob.STATE_SUCCEEDED, 2)
    assert await site.metrics(broken.name) == await site.metrics(whole.name)
    digests = [
        [(checkpoint.step, checkpoint.digest) for checkpoint in await site.checkpoints(name)]
        for name in (whole.name, broken.name)
    ]
    assert digests[0] == digests[1]


async def test_a_run_with_dropout_that_is_stopped_ends_with_the_same_bits(
    site: Site, model_folder: Path, tmp_path: Path
) -> None:
    wanted = job_of()
    wanted.lora.dropout = 0.3
    async with site.worker():
        site.data.tokenizer_digest = (await site.register(model_folder)).tokenizer_digest
        plain = await ended(site, "plain", job_of())
        whole = await ended(site, "whole", wanted)
    broken = await site.create_job("broken", wanted)
    await stop_after_a_checkpoint(site, broken.name)
    async with site.worker():
        assert (await site.ended(broken.name)).num_attempts == 2
    metrics = await site.metrics(whole.name)
    assert await site.metrics(broken.name) == metrics
    assert metrics[0]["train_loss"] == (await site.metrics(plain.name))[0]["train_loss"], "B is zero"
    assert metrics[-1]["train_loss"] != (await site.metrics(plain.name))[-1]["train_loss"]
    digests = [
        [(checkpoint.step, checkpoint.digest) for checkpoint in await site.checkpoints(name)]
        for name in (whole.name, broken.name)
    ]
    assert digests[0] == digests[1]
    folder = await downloaded(site, whole.tuned_model, tmp_path / "adapter")
    assert json.loads((folder / "adapter_config.json").read_text())["lora_dropout"] == 0.3


async def test_an_adapter_is_tuned_on_tuned_weights(site: Site, model_folder: Path, tmp_path: Path) -> None:
    async with site.worker():
        site.data.tokenizer_digest = (await site.register(model_folder)).tokenizer_digest
        first = await ended(site, "one", full_job())
        wanted = job_of(max_steps=1)
        wanted.base_model = first.tuned_model
        second = await ended(site, "two", wanted)
    last, next_ = (await site.metrics(first.name))[-1], (await site.metrics(second.name))[0]
    assert next_["train_loss"] < (await site.metrics(first.name))[0]["train_loss"] - 0.1, last
    assert (await model_of(site, second)).base_model == first.tuned_model
    folder = await downloaded(site, second.tuned_model, tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == first.tuned_model


@pytest.mark.parametrize("from_checkpoint", [False, True])
async def test_an_adapter_is_gone_on_with_from_where_it_stands(
    site: Site, model_folder: Path, tmp_path: Path, *, from_checkpoint: bool
) -> None:
    async with site.worker():
        site.data.tokenizer_digest = (await site.register(model_folder)).tokenizer_digest
        wanted = job_of(max_steps=3)
        wanted.lora.target_modules.extend(["q_proj", "down_proj"])
        wanted.lora.use_rslora = True
        wanted.lora.rank_pattern[r"layers\.0\..*"] = 2
        wanted.lora.alpha_pattern["down_proj"] = 3
        first = await ended(site, "one", wanted)
        start = f"{first.name}/checkpoints/step-3" if from_checkpoint else first.tuned_model
        second = await ended(site, "two", going_on(start))
        logs = [event.log.text async for event in site.watch(second.name) if event.HasField("log")]
    assert f"begins from {start}" in logs
    assert second.start_from == start
    one, two = [
        load_file(
            await downloaded(site, job.tuned_model, tmp_path / job.name[-3:]) / "adapter_model.safetensors"
        )
        for job in (first, second)
    ]
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    configs = [
        json.loads((tmp_path / folder / "adapter_config.json").read_text()) for folder in ("one", "two")
    ]
    assert configs[0] == configs[1]
    assert configs[0]["rank_pattern"] == {r"layers\.0\..*": 2}
    assert configs[0]["alpha_pattern"] == {"down_proj": 3}
    ranks = {name: len(factor) for name, factor in one.items() if "lora_A" in name}
    assert all(rank == (2 if ".layers.0." in name else 4) for name, rank in ranks.items())
    # Its first step finds what was learnt: the loss goes on from there.
    assert (await site.metrics(second.name))[0]["train_loss"] < (await site.metrics(first.name))[0][
        "train_loss"
    ]


# peft 0.21 still calls what transformers 5 has renamed.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
async def test_an_embedding_is_trained_whole_beside_an_adapter_and_gone_on_with(
    site: Site, model_folder: Path, tmp_path: Path
) -> None:
    """Also by a worker that goes on where another stopped; the next job has the masters, to the bit."""
    wanted = job_of(max_steps=5)
    wanted.lora.trained_modules.append("embed_tokens")
    wanted.lora.dropout = 0.1
    async with site.worker():
        site.data.tokenizer_digest = (await site.register(model_folder)).tokenizer_digest
        whole = await ended(site, "whole", wanted)
    broken = await site.create_job("broken", wanted)
    await stop_after_a_checkpoint(site, broken.name)
    async with site.worker():
        assert (await site.ended(broken.name)).num_attempts == 2
        second = await ended(site, "two", going_on(whole.tuned_model))
    digests = [
        [(checkpoint.step, checkpoint.digest) for checkpoint in await site.checkpoints(name)]
        for name in (whole.name, broken.name)
    ]
    assert digests[0] == digests[1]
    assert list(second.lora.trained_modules) == ["embed_tokens"]
    folders = [await downloaded(site, job.tuned_model, tmp_path / job.name[-3:]) for job in (whole, second)]
    one, two = [load_file(folder / "adapter_model.safetensors") for folder in folders]
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    base = load_file(model_folder / "model.safetensors")["model.embed_tokens.weight"].float()
    assert not torch.allclose(one["base_model.model.model.embed_tokens.weight"], base, atol=1e-3)
    ours = load_model(model_folder)
    load_adapter(ours, folders[0], "tuned")
    theirs: Any = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16), folders[0]
    ).eval()
    ids = torch.arange(5, 25).unsqueeze(0)
    with torch.no_grad(), use_adapter(ours, "tuned"):
        assert torch.allclose(ours(ids).logits.float(), theirs(ids).logits.float(), atol=0.05)


async def test_the_head_of_a_model_whose_embedding_it_is_is_not_trained_alone(
    site: Site, model_folder: Path
) -> None:
    wanted = job_of()
    wanted.lora.trained_modules.append("lm_head")
    async with site.worker():
        site.data.tokenizer_digest = (await site.register(model_folder)).tokenizer_digest
        job = await site.ended((await site.create_job("one", wanted)).name)
    assert job.state == FineTuningJob.STATE_FAILED
    assert (
        "trained_modules must name embed_tokens: it and the head are one weight in this model"
        in job.error.message
    )


async def test_a_pattern_that_matches_no_module_is_refused_where_a_worker_tells_its_memory(
    site: Site, model_folder: Path
) -> None:
    wanted = job_of()
    wanted.lora.rank_pattern["query"] = 2
    async with site.worker():
        site.data.tokenizer_digest = (await site.register(model_folder)).tokenizer_digest
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await site.create_job("one", wanted)
    said = caught.value.details() or ""
    assert "the pattern 'query' of rank_pattern must match a module that the adapter changes" in said
    assert "'q_proj'" in said


async def test_all_weights_of_a_checkpoint_are_gone_on_with_in_full_precision(
    site: Site, model_folder: Path
) -> None:
    """What bfloat16 rounds away is in the masters: with them a run goes on to the bit."""
    async with site.worker():
        site.data.tokenizer_digest = (await site.register(model_folder)).tokenizer_digest
        first = await ended(site, "one", full_job(max_steps=3))
        second = await ended(site, "two", going_on(f"{first.name}/checkpoints/step-3"))
    assert second.WhichOneof("adaptation") == "full"
    masters = _digests(site, "masters.safetensors")
    assert masters["one"] == masters["two"]


def _digests(site: Site, path: str) -> dict[str, str]:
    """Digest of a file of the last checkpoint of each job, by the job's id."""
    with contextlib.closing(sqlite3.connect(service_file(site.home, "training"))) as database:
        rows = database.execute("SELECT message, private FROM checkpoints ORDER BY step").fetchall()
    return {
        Checkpoint.FromString(message).name.split("/")[3]: file.sha256
        for message, private in rows
        for file in CheckpointPrivate.FromString(private).files
        if file.path == path
    }
