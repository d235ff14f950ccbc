"""Jobs paused and gone on with through real services and workers: the end has the bits of one left alone."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Any

import grpc
import pytest
from tests.training.conftest import rows_of_units
from tests.training.worker.conftest import Site, job_of
from tests.training.worker.real_worker import real_worker
from tests.training.worker.test_methods import preference
from tests.training.worker.test_reinforcement import prompts, registered, reinforcement

from luthier.training.executors.inline import InChild
from luthier.training.executors.torchrun import Crew, Torchrun
from luthier.training.worker import steps
from luthier.v1.event_pb2 import AttemptChange, Event
from luthier.v1.fine_tuning_job_pb2 import (
    SHARDING_FSDP2,
    FineTuningJob,
    FullConfig,
    RankRange,
    RewardModelConfig,
)
from luthier.v1.model_service_pb2 import ListModelFilesRequest
from luthier.v1.rendering_pb2 import RENDERING_KIND_PREFERENCE
from luthier.v1.training_service_pb2 import (
    CancelFineTuningJobRequest,
    GetFineTuningJobRequest,
    PauseFineTuningJobRequest,
    ResumeFineTuningJobRequest,
)
from luthier.work.children import Children
from luthier.work.context import TaskContext
from luthier.work.requirements import Equipment

__all__ = ["prompts"]
State = FineTuningJob.State


@pytest.fixture
def _unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step takes as long as it takes to hear of a pause, and the run asks after each."""
    told = TaskContext.metrics

    def metrics(context: TaskContext, step: int, values: Mapping[str, float]) -> None:
        told(context, step, values)
        time.sleep(0.1)

    monkeypatch.setattr(TaskContext, "metrics", metrics)
    monkeypatch.setattr(steps, "ASK_SECONDS", 0.0)


def wanted(**hyperparameters: Any) -> FineTuningJob:
    """A job of some five steps an epoch, with validations between, and no checkpoint of its own before its end."""
    job = job_of(**{"num_epochs": 6, **hyperparameters})
    job.checkpoint_interval_steps = 1000
    return job


async def pause(site: Site, name: str) -> FineTuningJob:
    request = PauseFineTuningJobRequest(name=name)
    job: FineTuningJob = await site.jobs.PauseFineTuningJob(request, metadata=site.metadata)
    return job


async def resume(site: Site, name: str) -> FineTuningJob:
    request = ResumeFineTuningJobRequest(name=name)
    job: FineTuningJob = await site.jobs.ResumeFineTuningJob(request, metadata=site.metadata)
    return job


async def found(site: Site, name: str) -> FineTuningJob:
    request = GetFineTuningJobRequest(name=name)
    job: FineTuningJob = await site.jobs.GetFineTuningJob(request, metadata=site.metadata)
    return job


async def seen(site: Site, name: str) -> AsyncIterator[Event]:
    async with asyncio.timeout(90), aclosing(site.watch(name)) as watching:
        async for event in watching:
            yield event


async def until_state(site: Site, name: str, state: State.ValueType) -> None:
    """Wait until a job is in a state."""
    async with asyncio.timeout(90):
        while (await found(site, name)).state != state:  # noqa: ASYNC110 - a service brings it about
            await asyncio.sleep(0.05)


async def until_step(site: Site, name: str, step: int) -> None:
    async for event in seen(site, name):
        if event.HasField("metrics") and event.step >= step:
            return
    pytest.fail(f"{name} ended before step {step}")


async def assert_pauses_with_a_checkpoint(site: Site, name: str, step: int) -> int:
    """Pause a job after a step; its last checkpoint is of the last step that it made. Returns that."""
    await until_step(site, name, step)
    assert (await pause(site, name)).state == State.STATE_PAUSING
    await until_state(site, name, State.STATE_PAUSED)
    made = len(await site.metrics(name))
    assert (await site.checkpoints(name))[-1].step == made >= step
    return made


async def weights_of(site: Site, job: FineTuningJob) -> dict[str, str]:
    request = ListModelFilesRequest(parent=job.tuned_model)
    files = (await site.models.ListModelFiles(request, metadata=site.metadata)).files
    return {file.path: file.sha256 for file in files}


async def assert_same_end(site: Site, left: FineTuningJob, right: FineTuningJob) -> None:
    """Two jobs have the same weights, optimiser state and metrics by step."""
    for job in (left, right):
        assert job.state == State.STATE_SUCCEEDED, job.error
    assert await site.metrics(left.name) == await site.metrics(right.name)
    last = [(await site.checkpoints(job.name))[-1] for job in (left, right)]
    assert (last[0].step, last[0].digest) == (last[1].step, last[1].digest)
    weights = await weights_of(site, left)
    assert weights == await weights_of(site, right)
    assert weights


def attempts(events: list[Event]) -> list[str]:
    kinds = [event.attempt_change.kind for event in events if event.HasField("attempt_change")]
    return [AttemptChange.Kind.Name(kind).removeprefix("KIND_") for kind in kinds]


@pytest.mark.usefixtures("_unhurried")
async def test_a_job_that_paused_twice_ends_with_the_same_bits(site: Site, model_folder: Path) -> None:
    async with site.worker():
        await registered(site, model_folder)
        whole = await site.ended((await site.create_job("whole", wanted())).name)
        job = await site.create_job("paused", wanted())
        first = await assert_pauses_with_a_checkpoint(site, job.name, 4)
        other = await site.ended((await site.create("between", num_epochs=1)).name)
        assert other.state == State.STATE_SUCCEEDED, "the worker is free"
        assert (await resume(site, job.name)).state == State.STATE_QUEUED
        second = await assert_pauses_with_a_checkpoint(site, job.name, first + 3)
        await resume(site, job.name)
        ended = await site.ended(job.name)
        events = [event async for event in site.watch(job.name)]
    assert first < second < len(await site.metrics(whole.name))
    await assert_same_end(site, whole, ended)
    assert (whole.num_attempts, ended.num_attempts) == (1, 3)
    assert attempts(events) == ["STARTED", "PAUSED", "STARTED", "PAUSED", "STARTED", "SUCCEEDED"]
    logs = [event.log.text for event in events if event.HasField("log")]
    assert [text for text in logs if "after step" in text] == [
        f"{word} after step {step}" for step in (first, second) for word in ("paused", "resuming")
    ]
    assert (
        0.0
        < ended.paused_seconds
        < (ended.end_time.ToMicroseconds() - ended.start_time.ToMicroseconds()) / 1e6
    )


async def test_reinforcement_that_paused_ends_with_the_same_bits(prompts: Site, model_folder: Path) -> None:
    steered = reinforcement(kl_weight=0.05)
    steered.checkpoint_interval_steps = 1000
    async with prompts.worker():
        await registered(prompts, model_folder)
        whole = await prompts.ended((await prompts.create_job("whole", steered)).name)
        job = await prompts.create_job("paused", steered)
        step = await assert_pauses_with_a_checkpoint(prompts, job.name, 3)
        await resume(prompts, job.name)
        ended = await prompts.ended(job.name)
    assert step < len(await prompts.metrics(whole.name))
    await assert_same_end(prompts, whole, ended)


def all_weights(job: FineTuningJob) -> FineTuningJob:
    job.full.CopyFrom(FullConfig())
    return job


def preferring(**hyperparameters: Any) -> FineTuningJob:
    job = preference(num_epochs=6, **hyperparameters)
    job.checkpoint_interval_steps = 1000
    return job


def rewarding(**hyperparameters: Any) -> FineTuningJob:
    job = preferring(**hyperparameters)
    job.reward_model.CopyFrom(RewardModelConfig())
    return job


@pytest.mark.usefixtures("_unhurried")
@pytest.mark.parametrize(
    "asked",
    [all_weights(wanted()), preferring(), all_weights(preferring()), rewarding()],
    ids=["all weights", "preference", "preference of all weights", "reward model"],
)
async def test_whatever_a_job_learns_it_ends_with_the_same_bits_when_it_paused(
    asked: FineTuningJob, site: Site, model_folder: Path
) -> None:
    if asked.WhichOneof("method"):
        site.data.rows = rows_of_units(30, "chosen", "rejected")
        site.data.kind = RENDERING_KIND_PREFERENCE
    async with site.worker():
        await registered(site, model_folder)
        whole = await site.ended((await site.create_job("whole", asked)).name)
        job = await site.create_job("paused", asked)
        step = await assert_pauses_with_a_checkpoint(site, job.name, 5)
        await resume(site, job.name)
        ended = await site.ended(job.name)
    assert step < len(await site.metrics(whole.name))
    assert (whole.num_attempts, ended.num_attempts) == (1, 2)
    await assert_same_end(site, whole, ended)


@pytest.mark.parametrize("is_divided", [False, True], ids=["each whole", "divided"])
async def test_two_ranks_pause_after_the_same_step_and_end_with_the_same_bits(
    site: Site, model_folder: Path, children: Children, *, is_divided: bool
) -> None:
    """Each has all weights, or a part of them and of what its optimiser knows."""
    asked = wanted(micro_batch_tokens=48, num_epochs=30)
    asked.ranks.CopyFrom(RankRange(min_ranks=2, max_ranks=2))
    if is_divided:
        all_weights(asked).sharding = SHARDING_FSDP2
    crew = Torchrun(children, Crew(num_ranks=2, num_threads=1))
    async with site.worker(compute=crew, equipment=Equipment(num_ranks=2)):
        await registered(site, model_folder)
        whole = await site.ended((await site.create_job("whole", asked)).name)
        job = await site.create_job("paused", asked)
        await assert_pauses_with_a_checkpoint(site, job.name, 3)
        assert children.num_running == 0, "both are gone"
        await resume(site, job.name)
        ended = await site.ended(job.name)
    assert ended.run_record.num_ranks == 2
    assert (ended.run_record.sharding == SHARDING_FSDP2) is is_divided
    await assert_same_end(site, whole, ended)


async def test_a_job_pauses_before_its_first_step_without_a_checkpoint(
    site: Site, model_folder: Path, children: Children, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While its worker loads the model: nothing has been made that could be lost."""
    told = TaskContext.progress

    def progress(context: TaskContext, phase: str, *arguments: Any, **named: Any) -> None:
        told(context, phase, *arguments, **named)
        if phase == "loading model" and context.task.subject.endswith("paused") and context.task.attempt == 1:
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:
                context.heed()
                # What is said brings back what the service wants.
                context.log("loading")
                time.sleep(0.1)

    monkeypatch.setattr(TaskContext, "progress", progress)
    async with site.worker(compute=InChild(children)):
        await registered(site, model_folder)
        whole = await site.ended((await site.create_job("whole", wanted())).name)
        job = await site.create_job("paused", wanted())
        await until_state(site, job.name, State.STATE_PREPARING)
        await pause(site, job.name)
        await until_state(site, job.name, State.STATE_PAUSED)
        assert await site.checkpoints(job.name) == []
        await resume(site, job.name)
        ended = await site.ended(job.name)
    await assert_same_end(site, whole, ended)


@pytest.mark.usefixtures("_unhurried")
async def test_a_job_that_is_about_to_end_ends_in_place_of_pausing(site: Site, model_folder: Path) -> None:
    async with site.worker():
        await registered(site, model_folder)
        job = await site.create_job("short", wanted(max_steps=1))
        await until_step(site, job.name, 1)
        asked = await pause(site, job.name)
        ended = await site.ended(job.name)
    assert asked.state == State.STATE_PAUSING
    assert ended.state == State.STATE_SUCCEEDED, ended.error


async def test_a_cancel_overtakes_a_pause(site: Site, model_folder: Path) -> None:
    async with site.worker():
        await registered(site, model_folder)
        job = await site.create_job("one", wanted(num_epochs=5000))
        await until_step(site, job.name, 1)
        await pause(site, job.name)
        request = CancelFineTuningJobRequest(name=job.name)
        await site.jobs.CancelFineTuningJob(request, metadata=site.metadata)
        async with asyncio.timeout(60):
            ended = await site.ended(job.name)
    assert ended.state == State.STATE_CANCELLED


async def test_a_worker_that_is_killed_while_pausing_changes_nothing(site: Site, model_folder: Path) -> None:
    asked = wanted(num_epochs=20)
    asked.checkpoint_interval_steps = 20
    with real_worker(site, "first") as running:
        await registered(site, model_folder)
        whole = await site.ended((await site.create_job("whole", asked)).name)
        job = await site.create_job("paused", asked)
        async for event in seen(site, job.name):
            if event.HasField("checkpoint"):
                break
        os.kill(running.pid, signal.SIGSTOP)
        assert (await pause(site, job.name)).state == State.STATE_PAUSING
        running.kill()
    with real_worker(site, "first"):
        await until_state(site, job.name, State.STATE_PAUSED)
        await resume(site, job.name)
        ended = await site.ended(job.name)
        events = [event async for event in site.watch(job.name)]
    await assert_same_end(site, whole, ended)
    assert attempts(events) == ["STARTED", "LOST", "STARTED", "SUCCEEDED"]


async def test_the_service_refuses_what_cannot_be(site: Site, model_folder: Path) -> None:
    async with site.worker():
        await registered(site, model_folder)
        job = await site.ended((await site.create_job("one", wanted(max_steps=1))).name)
    for call in (pause, resume):
        with pytest.raises(grpc.aio.AioRpcError, match="it is SUCCEEDED") as refused:
            await call(site, job.name)
        assert refused.value.code() == grpc.StatusCode.FAILED_PRECONDITION
