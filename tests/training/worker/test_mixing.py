"""Mixed renderings by a worker of a real Training service: what was planned is what ran, also after a stop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.training.conftest import rows_of_units
from tests.training.worker.conftest import (
    PARENT,
    RENDERING,
    Site,
    SmallDataService,
    job_of,
    stop_after_a_checkpoint,
)
from tests.training.worker.test_methods import digests, preference, registered

from luthier.v1.fine_tuning_job_pb2 import FineTuningJob, FineTuningPlan, FullConfig, RenderingShare
from luthier.v1.rendering_pb2 import RENDERING_KIND_PREFERENCE
from luthier.v1.training_service_pb2 import PlanFineTuningJobRequest

GENERAL = f"{PARENT}/renderings/general"


@pytest.fixture
def mixed(site: Site, token_rows: Callable[..., list[Any]]) -> Site:
    """The site, with a second rendering, shorter than the first and from another file."""
    site.data.others[GENERAL] = SmallDataService(token_rows(15, seed=9), GENERAL, "general.jsonl")  # type: ignore[abstract]
    site.data.others[GENERAL].digest = site.data.others[GENERAL].digest_once_read = "g" * 64
    return site


async def ready(site: Site, folder: Path) -> None:
    await registered(site, folder)
    site.data.others[GENERAL].tokenizer_digest = site.data.tokenizer_digest


def mixing(job: FineTuningJob, share: float = 0.3) -> FineTuningJob:
    job.mixed_renderings.append(RenderingShare(rendering=GENERAL, share=share))
    return job


async def planned(site: Site, job: FineTuningJob) -> FineTuningPlan:
    request = PlanFineTuningJobRequest(parent=PARENT, fine_tuning_job=job)
    plan: FineTuningPlan = await site.jobs.PlanFineTuningJob(request, metadata=site.metadata)
    return plan


async def test_a_mixed_job_runs_as_it_was_planned_and_goes_on_with_the_same_bits(
    mixed: Site, model_folder: Path
) -> None:
    wanted = mixing(job_of())
    async with mixed.worker():
        await ready(mixed, model_folder)
        plan = await planned(mixed, wanted)
        whole = await mixed.ended((await mixed.create_job("whole", wanted)).name)
    assert whole.state == FineTuningJob.STATE_SUCCEEDED, whole.error
    metrics = await mixed.metrics(whole.name)
    assert len(metrics) == plan.num_steps
    assert sum(point["num_tokens"] for point in metrics) == plan.num_tokens
    assert sum(point["num_supervised_tokens"] for point in metrics) == plan.num_supervised_tokens
    assert list(whole.run_record.renderings) == list(plan.renderings)
    own, general = plan.renderings
    assert (own.num_epochs, own.rendering, general.rendering) == (2, RENDERING, GENERAL)
    assert general.reached_share == pytest.approx(0.3, abs=0.05)
    assert (own.digest, general.digest) == ("r" * 64, "g" * 64)
    assert metrics[-1]["validation_loss_1"] != metrics[-1]["validation_loss"]
    assert {"share_1", "validation_token_accuracy_1"} <= metrics[-1].keys()

    broken = await mixed.create_job("broken", wanted)
    await stop_after_a_checkpoint(mixed, broken.name)
    async with mixed.worker():
        resumed = await mixed.ended(broken.name)
    assert (resumed.num_attempts, resumed.state) == (2, FineTuningJob.STATE_SUCCEEDED)
    assert await mixed.metrics(broken.name) == metrics
    assert await digests(mixed, broken) == await digests(mixed, whole)
    assert resumed.run_record == whole.run_record


async def test_all_weights_are_compared_with_a_reference_of_both_renderings(
    mixed: Site, model_folder: Path
) -> None:
    """What it was computed on has its rows numbered through, and is read again by who goes on."""
    mixed.data.rows = rows_of_units(30, "chosen", "rejected")
    mixed.data.others[GENERAL].rows = rows_of_units(10, "chosen", "rejected")
    for one in (mixed.data, mixed.data.others[GENERAL]):
        one.kind = RENDERING_KIND_PREFERENCE
    wanted = mixing(preference())
    wanted.full.CopyFrom(FullConfig())
    async with mixed.worker():
        await ready(mixed, model_folder)
        whole = await mixed.ended((await mixed.create_job("whole", wanted)).name)
    broken = await mixed.create_job("broken", wanted)
    await stop_after_a_checkpoint(mixed, broken.name)
    async with mixed.worker():
        assert (await mixed.ended(broken.name)).num_attempts == 2
    metrics = await mixed.metrics(whole.name)
    assert metrics[0]["reward_margin"] == pytest.approx(0.0, abs=1e-3)
    assert "validation_reward_margin_1" in metrics[-1]
    assert await mixed.metrics(broken.name) == metrics
    assert await digests(mixed, broken) == await digests(mixed, whole)


async def test_a_failure_names_the_lines_of_each_rendering_in_its_own_file(
    mixed: Site, model_folder: Path
) -> None:
    """Where rows of both have the same numbers."""
    async with mixed.worker():
        await ready(mixed, model_folder)
        wanted = mixing(job_of(learning_rate=1000.0, num_epochs=50, batch_rows=4, batch_tokens=None), 0.6)
        wanted.validation_interval_steps = 10_000
        wanted.lora.alpha = 1e6
        job = await mixed.ended((await mixed.create_job("one", wanted)).name)
    assert job.state == FineTuningJob.STATE_FAILED
    told = job.error.details[0].value.decode(errors="replace")
    assert f" of {GENERAL}" in job.error.message
    places = job.error.message.partition("; the first of them are ")[2].split(", ")
    listed = job.error.message.partition("whose rows are ")[2].partition("; a learning rate")[0]
    named = [
        ("general.jsonl" if part.endswith(GENERAL) else "a.jsonl", int(number) + 1)
        for part in listed.split("; ")
        for number in part.partition(" of ")[0].split(", ")
    ]
    assert places == [f"{file}:{line}" for file, line in named[:3]]
    assert any(place.startswith("general.jsonl:") for place in places)
    assert GENERAL in told


async def test_a_mixed_rendering_that_changed_fails_the_job_by_its_name(
    mixed: Site, model_folder: Path
) -> None:
    async with mixed.worker():
        await ready(mixed, model_folder)
    job = await mixed.create_job("one", mixing(job_of()))
    other = mixed.data.others[GENERAL]
    other.digest = other.digest_once_read = "s" * 64
    async with mixed.worker():
        ended = await mixed.ended(job.name)
    assert ended.state == FineTuningJob.STATE_FAILED
    assert ended.error.message.startswith(f"{GENERAL} must have digest {'g' * 64}")


async def test_rows_of_a_mixed_rendering_that_teach_nothing_are_told_of_by_its_name(
    mixed: Site, model_folder: Path, token_rows: Callable[..., list[Any]]
) -> None:
    rows = token_rows(15, seed=9)
    rows[0] = replace(rows[0], loss_mask=(False,) * len(rows[0].loss_mask))
    mixed.data.others[GENERAL].rows = rows
    async with mixed.worker():
        await ready(mixed, model_folder)
        job = await mixed.ended((await mixed.create_job("one", mixing(job_of()))).name)
        logs = [event.log.text async for event in mixed.watch(job.name) if event.HasField("log")]
    assert job.state == FineTuningJob.STATE_SUCCEEDED, job.error
    assert f"1 of 12 training rows of {GENERAL} teach nothing and are not used" in logs


async def test_validation_rows_that_a_mixed_rendering_trains_on_are_told_of(
    mixed: Site, model_folder: Path
) -> None:
    """The fifth row of each rendering is the first that is measured."""
    rows = list(mixed.data.others[GENERAL].rows)
    rows[1] = replace(mixed.data.rows[4], row=1, split="TRAIN")
    mixed.data.others[GENERAL].rows = rows
    async with mixed.worker():
        await ready(mixed, model_folder)
        job = await mixed.ended((await mixed.create_job("one", mixing(job_of()))).name)
        logs = [event.log.text async for event in mixed.watch(job.name) if event.HasField("log")]
    assert job.state == FineTuningJob.STATE_SUCCEEDED, job.error
    (told,) = [text for text in logs if "have the tokens of training rows" in text]
    assert told.startswith("1 of ")
    assert (
        f"the first is row 4 of {RENDERING} (a.jsonl:5), which is row 1 of {GENERAL} (general.jsonl:2) in"
        in told
    )
