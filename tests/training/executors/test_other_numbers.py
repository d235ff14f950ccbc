"""Jobs that go on on another number of ranks than they began with: the same steps, and no promise of the same bits."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.training.conftest import rows_of_units
from tests.training.executors.test_torchrun import assert_close, crew_of, texts
from tests.training.worker.conftest import Site, job_of, stop_after_a_checkpoint
from tests.training.worker.test_in_child import changes
from tests.training.worker.test_methods import preference

from luthier.v1.event_pb2 import AttemptChange
from luthier.v1.fine_tuning_job_pb2 import (
    DETERMINISM_BEST_EFFORT,
    DETERMINISM_BITWISE,
    FineTuningJob,
    FullConfig,
    RankRange,
)
from luthier.v1.rendering_pb2 import RENDERING_KIND_PREFERENCE
from luthier.v1.training_service_pb2 import GetFineTuningJobRequest
from luthier.work.children import Children
from luthier.work.requirements import Equipment


def supervised() -> FineTuningJob:
    return job_of(micro_batch_tokens=48)


def preferring() -> FineTuningJob:
    """All weights: what they are compared with is a file of the checkpoint."""
    job = preference(micro_batch_tokens=80, learning_rate=1e-3, num_epochs=2)
    job.full.CopyFrom(FullConfig())
    return job


def on(job: FineTuningJob) -> FineTuningJob:
    job.ranks.CopyFrom(RankRange(min_ranks=1, max_ranks=2))
    return job


@pytest.mark.parametrize(
    ("asked", "before", "after"),
    [(supervised, 2, 1), (supervised, 1, 2), (preferring, 2, 1), (preferring, 1, 2)],
    ids=["supervised 2 to 1", "supervised 1 to 2", "preference 2 to 1", "preference 1 to 2"],
)
async def test_a_job_whose_worker_stops_goes_on_on_another_number_of_ranks(
    asked: Callable[[], FineTuningJob],
    before: int,
    after: int,
    site: Site,
    model_folder: Path,
    children: Children,
) -> None:
    if asked is preferring:
        site.data.rows = rows_of_units(30, "chosen", "rejected")
        site.data.kind = RENDERING_KIND_PREFERENCE

    def worker(num_ranks: int) -> dict[str, Any]:
        return {"compute": crew_of(children, num_ranks), "equipment": Equipment(num_ranks=num_ranks)}

    async with site.worker(**worker(1)):
        site.data.tokenizer_digest = (await site.register(model_folder)).tokenizer_digest
        whole = await site.ended((await site.create_job("whole", asked())).name)
    job = await site.create_job("moved", on(asked()))
    began = time.monotonic()
    await stop_after_a_checkpoint(site, job.name, **worker(before))
    assert time.monotonic() - began < 60.0
    assert children.num_running == 0, "all ranks are gone with their worker"
    stopped = await found(site, job.name)
    assert (stopped.state, stopped.run_record.num_ranks) == (FineTuningJob.STATE_QUEUED, before)
    assert stopped.run_record.determinism == DETERMINISM_BITWISE
    # A further one may have come before the worker heard that it is to stop.
    kept = max(await site.checkpoints(job.name), key=lambda one: one.step)
    async with site.worker(**worker(after)):
        async with asyncio.timeout(60.0):
            ended = await site.ended(job.name)
        events = [event async for event in site.watch(job.name)]
    assert (ended.state, ended.num_attempts) == (FineTuningJob.STATE_SUCCEEDED, 2), ended.error
    assert changes(events) == [
        (AttemptChange.KIND_LOST, "SHUTTING_DOWN"),
        (AttemptChange.KIND_SUCCEEDED, ""),
    ]
    assert f"resuming after step {kept.step}" in texts(events)
    record = ended.run_record
    assert (record.num_ranks, record.determinism) == (after, DETERMINISM_BEST_EFFORT)
    assert record.best_effort_reason == "num_ranks changed since the run began"
    assert [text for text in texts(events) if text.startswith("since the run began, num_ranks changed")]
    assert_close(await site.metrics(job.name), await site.metrics(whole.name))


async def found(site: Site, name: str) -> FineTuningJob:
    request = GetFineTuningJobRequest(name=name)
    job: FineTuningJob = await site.jobs.GetFineTuningJob(request, metadata=site.metadata)
    return job
