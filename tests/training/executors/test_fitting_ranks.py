"""A job that takes more ranks than any worker has waits for one that has as many, and says so; nothing is lost."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from tests.training.worker.conftest import Site, job_of
from tests.training.worker.real_worker import real_worker

from luthier.errors.status import status_to_failure
from luthier.v1.event_pb2 import AttemptChange
from luthier.v1.fine_tuning_job_pb2 import FineTuningJob, RankRange
from luthier.v1.training_service_pb2 import GetFineTuningJobRequest
from luthier.work import waiting
from luthier.work.machine import num_cores


async def until_waiting(site: Site, name: str) -> FineTuningJob:
    request = GetFineTuningJobRequest(name=name)
    async with asyncio.timeout(120):
        while True:
            job: FineTuningJob = await site.jobs.GetFineTuningJob(request, metadata=site.metadata)
            if status_to_failure(job.waiting).metadata.get("requirement") == "ranks":
                return job
            await asyncio.sleep(0.2)


@pytest.mark.long
@pytest.mark.e2e
@pytest.mark.skipif(num_cores() < 2, reason="a worker takes at most as many ranks as there are processors")
async def test_a_job_waits_for_a_worker_with_as_many_ranks_as_it_takes(
    site: Site, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "PATIENCE_SECONDS", 0.5)
    monkeypatch.setattr(waiting, "WORDS_SECONDS", 0.5)
    wanted = job_of(micro_batch_tokens=48)
    wanted.ranks.CopyFrom(RankRange(min_ranks=2))
    with real_worker(site, "narrow"):
        site.data.tokenizer_digest = (await site.register(model_folder)).tokenizer_digest
        made = await site.create_job("wide", wanted)
        job = await until_waiting(site, made.name)
        failure = status_to_failure(job.waiting)
        assert (job.state, failure.reason) == (FineTuningJob.STATE_QUEUED, "NO_FITTING_WORKER")
        assert "it requires a device and at least 2 ranks; training-narrow has CPU" in failure.message
        assert failure.message.endswith("luthierd worker training --executor torchrun --ranks 2")
        with real_worker(site, "wide", "--executor", "torchrun", "--ranks", "2"):
            done = await asyncio.wait_for(site.ended(made.name), 300)
    assert done.state == FineTuningJob.STATE_SUCCEEDED, done.error
    assert (done.run_record.num_ranks, done.num_attempts) == (2, 1)
    assert not done.HasField("waiting")
    kinds = [
        (event.attempt_change.kind, event.attempt_change.worker)
        async for event in site.watch(made.name)
        if event.HasField("attempt_change")
    ]
    assert kinds == [
        (AttemptChange.KIND_STARTED, "training-wide"),
        (AttemptChange.KIND_SUCCEEDED, "training-wide"),
    ], "no attempt was lost"
