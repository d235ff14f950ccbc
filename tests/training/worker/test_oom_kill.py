"""A process that the kernel ends for want of memory, for real: its job says so, and its worker goes on."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.memory_group import MemoryGroup, memory_group
from tests.training.worker.conftest import Site, job_of
from tests.training.worker.real_worker import real_worker

from luthier.errors.status import status_to_failure
from luthier.training.fitting import expected_words
from luthier.v1.event_pb2 import AttemptChange
from luthier.v1.fine_tuning_job_pb2 import FineTuningJob, RankRange
from luthier.work.machine import num_cores

GLUTTON = """
import time
held = []
while True:
    held.append(bytearray(b"x" * (4 << 20)))
    time.sleep(0.02)
"""
"""Takes what others need, until it is ended itself."""


@contextmanager
def glutton(group: MemoryGroup) -> Iterator[None]:
    running = subprocess.Popen(group.command(sys.executable, "-c", GLUTTON))
    try:
        yield
    finally:
        running.kill()
        running.wait()


async def until_step(site: Site, name: str, step: int) -> None:
    """Wait until a job has made so many steps."""
    async for event in site.watch(name):
        if event.HasField("metrics") and event.step >= step:
            return


def on_ranks(num_ranks: int) -> FineTuningJob:
    """Return a job that takes so many, and comes to no end."""
    job = job_of(num_epochs=10_000, micro_batch_tokens=48)
    job.ranks.CopyFrom(RankRange(min_ranks=num_ranks, max_ranks=num_ranks))
    return job


@pytest.mark.long
@pytest.mark.e2e
@pytest.mark.parametrize("num_ranks", [1, 2])
async def test_a_training_that_the_kernel_ends_for_want_of_memory_fails_with_out_of_memory(
    site: Site, model_folder: Path, num_ranks: int
) -> None:
    """Of two ranks the kernel ends one, or both one after the other."""
    if num_ranks > num_cores():
        pytest.skip("a worker takes at most as many ranks as there are processors")
    options = () if num_ranks == 1 else ("--executor", "torchrun", "--ranks", str(num_ranks))
    with memory_group() as group, real_worker(site, "small", *options, group=group) as worker:
        site.data.tokenizer_digest = (await site.register(model_folder)).tokenizer_digest
        made = await site.create_job("starved", on_ranks(num_ranks))
        await until_step(site, made.name, 3)
        group.limit(group.held_bytes() + (16 << 20))
        with glutton(group):
            job = await asyncio.wait_for(site.ended(made.name), 300)
        assert group.kills() >= 1
        group.free()
        again = await asyncio.wait_for(site.ended((await site.create("fed")).name), 300)
        assert worker.poll() is None, "the worker itself goes on"
        events = [event async for event in site.watch(made.name)]
        attempts = [event.attempt_change async for event in site.watch(again.name)]
    assert (job.state, job.run_record.num_ranks) == (FineTuningJob.STATE_FAILED, num_ranks)
    failure = status_to_failure(job.error)
    assert failure.reason == "OUT_OF_MEMORY"
    assert "ended by the kernel for want of memory" in failure.message
    assert f"; its passes {expected_words(job.run_record.memory)}" in failure.message, "the plan's figures"
    changes = [event.attempt_change for event in events if event.HasField("attempt_change")]
    assert [(one.kind, one.reason) for one in changes] == [
        (AttemptChange.KIND_STARTED, ""),
        (AttemptChange.KIND_FAILED, "OUT_OF_MEMORY"),
    ]
    assert (again.state, again.num_attempts) == (FineTuningJob.STATE_SUCCEEDED, 1), (again.error, attempts)


@pytest.mark.long
@pytest.mark.e2e
def test_a_process_in_a_group_has_the_memory_that_the_group_has() -> None:
    with memory_group() as group:
        group.limit(3 << 30)
        script = "from luthier.work.machine import *; print(memory_bytes(), available_bytes())"
        done = subprocess.run(
            group.command(sys.executable, "-c", script), check=True, capture_output=True, text=True
        )
    whole, left = map(int, done.stdout.split())
    assert whole == 3 << 30
    assert 0 < left <= whole
