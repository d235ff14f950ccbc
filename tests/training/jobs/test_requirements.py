"""What a job requires of its worker, and what it shows while nobody meets that."""

from __future__ import annotations

from typing import Any

from luthier.errors import Failure, Reason
from luthier.errors.status import failure_to_status
from luthier.v1.device_pb2 import DEVICE_KIND_GPU, Requirements
from luthier.v1.fine_tuning_job_pb2 import RankRange
from luthier.work.repository import Tasks
from luthier.work.requirements import GIB, Equipment
from luthier.work.tasks import TaskKind

JOB = "projects/default/fineTuningJobs/one"


async def test_a_job_is_given_to_a_worker_that_has_what_it_requires(bench: Any) -> None:
    required = Requirements(device=DEVICE_KIND_GPU, min_memory_bytes=24 * GIB)
    job = await bench.create("one", requirements=required)
    assert job.requirements == required
    small = Equipment(device="CUDA", memory_bytes=16 * GIB)
    assert await bench.queue.claim("worker@1", [TaskKind.TRAIN], 0.0, "c", small) is None
    large = Equipment(device="ROCM", memory_bytes=64 * GIB)
    claimed = await bench.queue.claim("worker@2", [TaskKind.TRAIN], 0.0, "c", large)
    assert claimed is not None
    assert claimed[1].train.job.requirements == required


async def test_a_job_is_given_to_a_worker_that_has_as_many_ranks_as_it_takes(bench: Any) -> None:
    await bench.create("one", ranks=RankRange(min_ranks=4, max_ranks=8))
    for name, num_ranks in (("old", 0), ("narrow", 3)):
        has = Equipment(device="CPU", num_ranks=num_ranks)
        assert await bench.queue.claim(f"{name}@1", [TaskKind.TRAIN], 0.0, "c", has) is None
    wide = Equipment(device="CPU", num_ranks=4)
    assert await bench.queue.claim("wide@1", [TaskKind.TRAIN], 0.0, "c", wide) is not None


async def test_a_job_that_no_worker_can_do_shows_it_until_it_begins(bench: Any) -> None:
    await bench.create("one")
    why = failure_to_status(Failure(code="UNAVAILABLE", reason=Reason.NO_FITTING_WORKER, message="none"))
    async with bench.database.transaction() as connection:
        (task,) = await Tasks().of_resource(connection, (await bench.job(JOB)).uid)
        await bench.queue._handlers[TaskKind.TRAIN].waits(connection, task, why)
    before = await bench.job(JOB)
    assert before.waiting.message == "none"
    await bench.claim()
    assert not (await bench.job(JOB)).HasField("waiting")
