"""The worker against a real Training service and a Data service that serves one small rendering."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from tests.training.worker.conftest import MODEL, PARENT, RENDERING, Site, job_of, stop_after_a_checkpoint

from luthier.errors import FailedPrecondition, Reason
from luthier.lm.module_patterns import targeted
from luthier.v1 import (
    event_pb2,
    fine_tuning_job_pb2,
    model_pb2,
    model_service_pb2,
    training_service_pb2,
)
from luthier.work.session import TaskSession


async def test_a_job_is_planned_trained_and_gives_a_model(site: Site, model_folder: Path) -> None:
    async with site.worker():
        model = await site.register(model_folder)
        assert model.state == model_pb2.Model.STATE_READY, model.error
        assert model.architecture == "LlamaForCausalLM"
        site.data.tokenizer_digest = model.tokenizer_digest
        plan = await site.jobs.PlanFineTuningJob(
            training_service_pb2.PlanFineTuningJobRequest(parent=PARENT, fine_tuning_job=job_of()),
            metadata=site.metadata,
        )
        job = await site.ended((await site.create("one")).name)
    assert job.state == fine_tuning_job_pb2.FineTuningJob.STATE_SUCCEEDED, job.error
    metrics = await site.metrics(job.name)
    assert len(metrics) == plan.num_steps == job.progress.completed
    assert sum(point["num_tokens"] for point in metrics) == plan.num_tokens
    assert sum(point["num_supervised_tokens"] for point in metrics) == plan.num_supervised_tokens
    assert metrics[-1]["train_loss"] < metrics[0]["train_loss"]
    assert "validation_loss" in metrics[-1]
    steps = [checkpoint.step for checkpoint in await site.checkpoints(job.name)]
    assert steps == [*range(3, plan.num_steps, 3), plan.num_steps][-3:]
    record = job.run_record
    assert record.base_model_digest == model.digest
    assert record.rendering_digest == site.data.digest
    assert record.determinism == fine_tuning_job_pb2.DETERMINISM_BITWISE
    assert record.num_threads >= 1
    assert record.torch_version
    listed = await site.models.ListModelFiles(
        model_service_pb2.ListModelFilesRequest(parent=job.tuned_model), metadata=site.metadata
    )
    adapter = [file.path for file in listed.files if not file.tokenizer]
    assert adapter == ["adapter_config.json", "adapter_model.safetensors", "generation_config.json"]
    download = model_service_pb2.DownloadModelFileRequest(name=job.tuned_model, path="adapter_config.json")
    pieces = site.models.DownloadModelFile(download, metadata=site.metadata)
    config = json.loads(b"".join([piece.data async for piece in pieces]))
    assert (config["r"], config["base_model_name_or_path"]) == (4, MODEL)
    assert all(credential.startswith("Bearer lt_") for credential in site.data.credentials)


async def test_a_job_whose_worker_stops_ends_with_the_same_bits(site: Site, model_folder: Path) -> None:
    async with site.worker():
        site.data.tokenizer_digest = (await site.register(model_folder)).tokenizer_digest
        whole = await site.ended((await site.create("whole")).name)
    broken = await site.create("broken")
    await stop_after_a_checkpoint(site, broken.name)
    async with site.worker():
        ended = await site.ended(broken.name)
    assert (whole.num_attempts, ended.num_attempts) == (1, 2)
    assert ended.state == fine_tuning_job_pb2.FineTuningJob.STATE_SUCCEEDED
    assert await site.metrics(broken.name) == await site.metrics(whole.name)
    digests = [
        [(checkpoint.step, checkpoint.digest) for checkpoint in await site.checkpoints(name)]
        for name in (whole.name, broken.name)
    ]
    assert digests[0] == digests[1]


async def test_a_cancelled_job_stops_after_its_step(site: Site, model_folder: Path) -> None:
    async with site.worker():
        site.data.tokenizer_digest = (await site.register(model_folder)).tokenizer_digest
        job = await site.create("one", num_epochs=5000)
        async for event in site.watch(job.name):
            if event.WhichOneof("payload") == "metrics":
                break
        request = training_service_pb2.CancelFineTuningJobRequest(name=job.name)
        asked = await site.jobs.CancelFineTuningJob(request, metadata=site.metadata)
        assert asked.state == fine_tuning_job_pb2.FineTuningJob.STATE_CANCELLING
        async with asyncio.timeout(60):
            ended = await site.ended(job.name)
    assert ended.state == fine_tuning_job_pb2.FineTuningJob.STATE_CANCELLED
    assert not ended.tuned_model


async def test_a_job_on_a_rendering_that_changed_fails(site: Site, model_folder: Path) -> None:
    async with site.worker():
        site.data.tokenizer_digest = (await site.register(model_folder)).tokenizer_digest
    job = await site.create("one")
    site.data.digest = site.data.digest_once_read = "s" * 64
    async with site.worker():
        ended = await site.ended(job.name)
    assert ended.state == fine_tuning_job_pb2.FineTuningJob.STATE_FAILED
    assert ended.error.message.startswith(f"{RENDERING} must have digest {'r' * 64}")


async def test_a_job_on_a_rendering_that_changes_while_it_is_read_fails(
    site: Site, model_folder: Path
) -> None:
    async with site.worker():
        site.data.tokenizer_digest = (await site.register(model_folder)).tokenizer_digest
    job = await site.create("one")
    site.data.digest_once_read = "s" * 64
    async with site.worker():
        ended = await site.ended(job.name)
    assert ended.state == fine_tuning_job_pb2.FineTuningJob.STATE_FAILED
    assert ended.error.message.startswith(f"{RENDERING} must have digest {'r' * 64}")
    assert "was deleted and its name used again" in ended.error.message


async def test_a_job_whose_loss_explodes_fails_and_names_the_step(site: Site, model_folder: Path) -> None:
    async with site.worker():
        site.data.tokenizer_digest = (await site.register(model_folder)).tokenizer_digest
        wanted = job_of(learning_rate=1000.0, num_epochs=9)
        wanted.lora.alpha = 1e6
        ended = await site.ended((await site.create_job("one", wanted)).name)
    assert ended.state == fine_tuning_job_pb2.FineTuningJob.STATE_FAILED
    assert "must be finite, got" in ended.error.message
    assert " at step " in ended.error.message


async def test_rows_that_only_their_lengths_show_to_be_too_long_fail_a_job_while_it_prepares(
    site: Site, model_folder: Path
) -> None:
    """Of rows that teach nothing the statistics tell, not how long those are that teach."""
    first = site.data.rows[0]
    longest = max(site.data.rows[1:], key=lambda row: len(row.input_ids)).row
    idle = replace(first, loss_mask=(False,) * len(first.input_ids))
    site.data.rows = [idle, *site.data.rows[1:]]
    async with site.worker():
        site.data.tokenizer_digest = (await site.register(model_folder)).tokenizer_digest
        small = training_service_pb2.PlanFineTuningJobRequest(
            parent=PARENT, fine_tuning_job=job_of(micro_batch_tokens=10)
        )
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await site.jobs.PlanFineTuningJob(small, metadata=site.metadata)
        ended = await site.ended((await site.create("one", micro_batch_tokens=10)).name)
        events = [event async for event in site.watch(ended.name)]
        enough = await site.create("two", micro_batch_tokens=48, max_steps=1)
        logs = [event.log.text async for event in site.watch(enough.name) if event.HasField("log")]
    assert ended.state == fine_tuning_job_pb2.FineTuningJob.STATE_FAILED
    told = f"micro_batch_tokens must be at least 24, the longest row (row {longest}), got 10"
    assert f"{told}; it is a.jsonl:{longest + 1}" in ended.error.message
    assert f"{told}; the longest is a.jsonl:{longest + 1}" in str(refused.value.details())
    states = [event.state_change.state for event in events if event.HasField("state_change")]
    assert states == ["QUEUED", "PREPARING", "FAILED"]
    assert "1 of 32 training rows teach nothing and are not used" in logs


async def test_a_checkpoint_whose_bytes_went_meanwhile_is_sent_again(
    site: Site, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused: list[int] = []
    commit = TaskSession.commit_checkpoint

    async def lose_once(self: TaskSession, step: int, *rest: Any) -> str:
        if not refused:
            refused.append(step)
            raise FailedPrecondition("blob is not here", reason=Reason.BLOB_MISSING)
        return await commit(self, step, *rest)

    monkeypatch.setattr(TaskSession, "commit_checkpoint", lose_once)
    async with site.worker():
        site.data.tokenizer_digest = (await site.register(model_folder)).tokenizer_digest
        ended = await site.ended((await site.create("one")).name)
        steps = [checkpoint.step for checkpoint in await site.checkpoints(ended.name)]
    assert ended.state == fine_tuning_job_pb2.FineTuningJob.STATE_SUCCEEDED, ended.error
    assert refused == [3]
    assert steps[-1] == ended.progress.completed


async def test_steps_go_on_while_a_checkpoint_is_stored(
    site: Site, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    later, overlapped = asyncio.Event(), list[int]()
    commit, add_event = TaskSession.commit_checkpoint, TaskSession.add_event

    def seen(self: TaskSession, event: event_pb2.Event) -> None:
        if event.HasField("metrics") and event.step > 3:
            later.set()
        add_event(self, event)

    async def held(self: TaskSession, step: int, *rest: Any) -> str:
        if step == 3:
            async with asyncio.timeout(20):
                await later.wait()
            overlapped.append(step)
        return await commit(self, step, *rest)

    monkeypatch.setattr(TaskSession, "add_event", seen)
    monkeypatch.setattr(TaskSession, "commit_checkpoint", held)
    async with site.worker():
        site.data.tokenizer_digest = (await site.register(model_folder)).tokenizer_digest
        ended = await site.ended((await site.create("one")).name)
        steps = [checkpoint.step for checkpoint in await site.checkpoints(ended.name)]
    assert ended.state == fine_tuning_job_pb2.FineTuningJob.STATE_SUCCEEDED, ended.error
    assert overlapped == [3], "step 4 was made before the checkpoint of step 3 was stored"
    assert steps == [6, 9, 10]


async def test_a_module_that_the_model_lacks_is_refused_or_fails_a_job_of_before(
    site: Site, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with site.worker():
        site.data.tokenizer_digest = (await site.register(model_folder)).tokenizer_digest
        wanted = job_of()
        wanted.lora.target_modules.append("c_attn")
        with pytest.raises(grpc.aio.AioRpcError, match="target 'c_attn' matches no linear layer") as refused:
            await site.create_job("one", wanted)
        assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        # A job that was queued when targets were not looked at before it began.
        monkeypatch.setattr(
            "luthier.training.fitting.targeted", lambda targets, modules: targeted(["q_proj"], modules)
        )
        ended = await site.ended((await site.create_job("one", wanted)).name)
    assert ended.state == fine_tuning_job_pb2.FineTuningJob.STATE_FAILED
    assert "target 'c_attn' matches no linear layer" in ended.error.message


async def test_a_folder_with_pickles_is_refused(site: Site, model_folder: Path) -> None:
    (model_folder / "pytorch_model.bin").write_bytes(b"\x80\x04")
    async with site.worker():
        model = await site.register(model_folder)
    assert model.state == model_pb2.Model.STATE_FAILED
    assert "pytorch_model.bin" in model.error.message


async def test_a_folder_that_vanished_is_a_missing_base_model(site: Site, model_folder: Path) -> None:
    request = model_service_pb2.RegisterBaseModelRequest(
        parent=PARENT, model_id="tiny", model=model_pb2.Model(directory=str(model_folder))
    )
    made = await site.models.RegisterBaseModel(request, metadata=site.metadata)
    await asyncio.to_thread(model_folder.rename, model_folder.with_name("elsewhere"))
    watch = model_service_pb2.WatchModelRequest(name=made.name)
    async with site.worker():
        states = [
            event.state_change
            async for event in site.models.WatchModel(watch, metadata=site.metadata)
            if event.WhichOneof("payload") == "state_change"
        ]
    assert [change.state for change in states] == ["QUEUED", "REGISTERING", "FAILED"]
    assert f"the source of {MODEL} must be readable" in states[-1].error.message
