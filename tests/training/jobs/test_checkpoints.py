"""Checkpoints of jobs: which are stored, which are kept."""

from __future__ import annotations

from typing import Any

import pytest
from tests.training.conftest import stored
from tests.work.checkpoints import checkpoint_of

from luthier.errors import NotFound
from luthier.runtime.digests import files_digest
from luthier.worker.v1 import task_pb2

JOB = "projects/default/fineTuningJobs/one"


async def test_checkpointed_again_at_the_same_step_changes_nothing(bench: Any) -> None:
    await bench.create("one")
    task, _ = await bench.claim()
    for text in ("1", "2"):
        file = await stored(bench, text)
        await bench.queue.commit_checkpoint(checkpoint_of(task, 5, [file]))
    uid = (await bench.job(JOB)).uid
    (checkpoint,) = await bench.jobs.checkpoints(uid, 0, 10)
    assert checkpoint.digest == files_digest({"a": (await stored(bench, "1")).sha256})


async def commit(bench: Any, task: Any, step: int, **metrics: float) -> None:
    file = await stored(bench, f"step {step}")
    await bench.queue.commit_checkpoint(checkpoint_of(task, step, [file], metrics))


async def kept(bench: Any) -> list[int]:
    uid = (await bench.job(JOB)).uid
    return [point.step for point in await bench.jobs.checkpoints(uid, 0, 100)]


async def test_the_last_checkpoints_and_the_best_are_kept(bench: Any) -> None:
    await bench.create("one", max_checkpoints=2)
    task, _ = await bench.claim()
    losses = {1: 3.0, 2: 1.0, 3: 2.0, 5: 1.5}
    for step in range(1, 7):
        validated = {"validation_loss": losses[step]} if step in losses else {}
        await commit(bench, task, step, train_loss=0.0, **validated)
    assert await kept(bench) == [2, 5, 6]
    await commit(bench, task, 7, validation_loss=0.5)
    await commit(bench, task, 8)
    assert await kept(bench) == [7, 8]


async def test_three_checkpoints_are_kept_unless_told_otherwise(bench: Any) -> None:
    job = await bench.create("one")
    assert job.max_checkpoints == 3
    task, _ = await bench.claim()
    for step in range(1, 6):
        await commit(bench, task, step)
    assert await kept(bench) == [3, 4, 5]


async def test_a_checkpoint_whose_bytes_are_not_there_is_refused(bench: Any) -> None:
    await bench.create("one")
    task, _ = await bench.claim()
    file = task_pb2.BlobFile(path="a", sha256="1" * 64, size_bytes=1)
    with pytest.raises(NotFound):
        await bench.queue.commit_checkpoint(checkpoint_of(task, 1, [file]))
    assert await kept(bench) == []


async def test_a_checkpoint_is_found_by_its_name_alone(bench: Any) -> None:
    await bench.create("one")
    task, _ = await bench.claim()
    await commit(bench, task, 5)
    assert (await bench.jobs.checkpoint(f"{JOB}/checkpoints/step-5")).step == 5
    for name in (
        f"{JOB}/checkpoints/step-05",
        f"{JOB}/checkpoints/step-6",
        f"{JOB}/checkpoints/five",
        "projects/default/fineTuningJobs/two/checkpoints/step-5",
    ):
        with pytest.raises(NotFound, match=name):
            await bench.jobs.checkpoint(name)
