"""Several ranks through real services, killed and stopped for real: the attempt is lost, and no bit changes."""

from __future__ import annotations

import asyncio
import math
import os
import re
import signal
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.training.executors.partitions import cut_off
from tests.training.worker.conftest import Site, job_of
from tests.training.worker.test_in_child import assert_same, changes

from luthier.errors.status import status_to_failure
from luthier.training.executors.inline import InChild
from luthier.training.executors.pulse import shown
from luthier.training.executors.torchrun import Crew, Torchrun
from luthier.training.worker.train import Compute
from luthier.v1.event_pb2 import AttemptChange, Event
from luthier.v1.fine_tuning_job_pb2 import FineTuningJob, RankRange
from luthier.v1.training_service_pb2 import CancelFineTuningJobRequest
from luthier.work.children import Children
from luthier.work.requirements import Equipment


def wanted(least: int = 2, most: int = 2, **hyperparameters: Any) -> FineTuningJob:
    job = job_of(**{"micro_batch_tokens": 48, **hyperparameters})
    job.ranks.CopyFrom(RankRange(min_ranks=least, max_ranks=most))
    return job


@asynccontextmanager
async def working(site: Site, folder: Path, compute: Compute) -> AsyncIterator[None]:
    async with site.worker(compute=compute, equipment=Equipment(num_ranks=3)):
        site.data.tokenizer_digest = (await site.register(folder)).tokenizer_digest
        yield


def crew_of(children: Children, num_ranks: int) -> Torchrun:
    return Torchrun(children, Crew(num_ranks=num_ranks, num_threads=1))


def assert_close(found: Sequence[Mapping[str, float]], expected: Sequence[Mapping[str, float]]) -> None:
    assert len(found) == len(expected) > 3
    for left, right in zip(found, expected, strict=True):
        assert left.keys() == right.keys()
        for name, value in right.items():
            assert left[name] == pytest.approx(value, rel=3e-3, abs=1e-5), name


def texts(events: Sequence[Event]) -> list[str]:
    return [event.log.text for event in events if event.HasField("log")]


async def test_a_job_takes_the_ranks_that_it_says_and_its_losses_do_not_depend_on_them(
    site: Site, model_folder: Path, children: Children
) -> None:
    async with working(site, model_folder, crew_of(children, 3)):
        one = await site.ended((await site.create("one", micro_batch_tokens=48)).name)
        said = [event async for event in site.watch(one.name)]
        three = await site.ended((await site.create_job("three", wanted(2, 8))).name)
        named = [event async for event in site.watch(three.name)]
    for job in (one, three):
        assert job.state == FineTuningJob.STATE_SUCCEEDED, job.error
    assert (one.run_record.num_ranks, three.run_record.num_ranks) == (1, 3)
    assert three.run_record.num_threads == 1
    assert (three.ranks.min_ranks, three.ranks.max_ranks) == (2, 8)
    assert "trains on 1 of this worker's 3 ranks: ranks.max_ranks says no more" in texts(said)
    idle = [text for text in texts(named) if "fewer forward passes than the run's 3 ranks" in text]
    assert len(idle) == 1
    assert_close(await site.metrics(three.name), await site.metrics(one.name))
    assert not list((site.home / "work").rglob("pulse-*")), "what ranks left is deleted"


async def test_passes_of_an_open_size_are_cut_so_that_each_rank_has_some(
    site: Site, model_folder: Path, children: Children
) -> None:
    async with working(site, model_folder, crew_of(children, 2)):
        ended = await site.ended((await site.create_job("open", wanted(micro_batch_tokens=0))).name)
        events = [event async for event in site.watch(ended.name)]
    assert ended.state == FineTuningJob.STATE_SUCCEEDED, ended.error
    largest = max(point["num_tokens"] for point in await site.metrics(ended.name))
    assert ended.run_record.micro_batch_tokens == math.ceil(largest / 2)
    assert not [text for text in texts(events) if "fewer forward passes" in text]


async def test_the_loss_of_a_rank_loses_the_attempt_within_ten_seconds_and_no_bit(
    site: Site, model_folder: Path, children: Children
) -> None:
    async with working(site, model_folder, crew_of(children, 2)):
        whole = await site.ended((await site.create_job("whole", wanted(num_epochs=12))).name)
        assert whole.state == FineTuningJob.STATE_SUCCEEDED, whole.error
        for number, rank in ((signal.SIGKILL, 1), (signal.SIGSTOP, 0)):
            hurt = await disturbed(site, f"hurt-{rank}", signalled(number, rank))
            assert hurt.job.state == FineTuningJob.STATE_SUCCEEDED, hurt.job.error
            lost, succeeded = changes(hurt.events)
            assert (lost, succeeded[0]) == (
                (AttemptChange.KIND_LOST, "RANK_LOST"),
                AttemptChange.KIND_SUCCEEDED,
            )
            assert f"rank {rank} of 2" in hurt.why
            assert re.search(r"; it was at step \d+, in a pass over rows .*\ba\.jsonl:\d+", hurt.why), (
                hurt.why
            )
            assert 0 < hurt.seconds < 10.0
            assert 0 < hurt.again_seconds < 15.0, "the queue and the service are part of it"
            assert len(hurt.pids) == 2
            assert not any(map(is_running, hurt.pids)), "one rank's end is the end of all"
            await assert_same(site, whole.name, hurt.job.name)


async def test_ranks_whose_network_is_cut_lose_the_attempt_within_ten_seconds_and_no_bit(
    site: Site, model_folder: Path, children: Children
) -> None:
    """The kernel drops what one sends the other: both live, their connections stay open, and nobody is told."""

    def cut(pids: Sequence[int]) -> None:
        assert min(map(cut_off, pids)) > 0, "each has a connection to the other"

    async with working(site, model_folder, crew_of(children, 2)):
        whole = await site.ended((await site.create_job("whole", wanted(num_epochs=12))).name)
        hurt = await disturbed(site, "cut", cut)
        assert hurt.job.state == FineTuningJob.STATE_SUCCEEDED, hurt.job.error
        lost, succeeded = changes(hurt.events)
        assert (lost, succeeded[0]) == ((AttemptChange.KIND_LOST, "RANK_LOST"), AttemptChange.KIND_SUCCEEDED)
        assert "they do not reach one another" in hurt.why
        assert 0 < hurt.seconds < 10.0
        assert not any(map(is_running, hurt.pids))
        await assert_same(site, whole.name, hurt.job.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hurt:
    """A job that lost a rank: its end, its events, why the attempt was lost, and what ran before.

    Counted from the hurt: seconds until the attempt was lost, and until the next one made a step.
    """

    job: FineTuningJob
    events: list[Event]
    why: str
    seconds: float
    again_seconds: float
    pids: list[int]


Hurting = Callable[[Sequence[int]], None]
"""Does something to the ranks of a job, by their process ids."""


def signalled(number: signal.Signals, rank: int) -> Hurting:
    """Return what sends a signal to one rank."""
    return lambda pids: os.kill(pids[rank], number)


async def disturbed(site: Site, job_id: str, hurt: Hurting, asked: FineTuningJob | None = None) -> Hurt:
    """Hurt the ranks of a job after its first checkpoint, and wait for the end."""
    job = await site.create_job(job_id, asked or wanted(num_epochs=12))
    events: list[Event] = []
    pids: list[int] = []
    hurt_at, seconds, again_seconds, why = 0.0, 0.0, 0.0, ""
    async for event in site.watch(job.name):
        events.append(event)
        if event.HasField("checkpoint") and not pids:
            pids = ranks_of(site)
            hurt_at = time.monotonic()
            hurt(pids)
        if event.attempt_change.kind == AttemptChange.KIND_LOST:
            seconds, why = time.monotonic() - hurt_at, event.attempt_change.message
        if why and not again_seconds and event.HasField("metrics"):
            again_seconds = time.monotonic() - hurt_at
    return Hurt(
        job=await site.ended(job.name),
        events=events,
        why=why,
        seconds=seconds,
        again_seconds=again_seconds,
        pids=pids,
    )


def ranks_of(site: Site) -> list[int]:
    """Return the process ids of the ranks that work now, in their order."""
    found = [shown(path) for path in sorted((site.home / "work").rglob("pulse-?"))]
    return [one.pid for one in found if one is not None]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


async def test_a_worker_that_has_fewer_ranks_than_it_said_gives_a_job_back(
    site: Site, model_folder: Path, children: Children
) -> None:
    """As one does with a job that was queued before workers said how many they have."""
    async with working(site, model_folder, InChild(children)):
        job = await site.create_job("many", wanted(2, 4))
        async for event in site.watch(job.name):
            if event.attempt_change.kind == AttemptChange.KIND_LOST:
                break
        await site.jobs.CancelFineTuningJob(CancelFineTuningJobRequest(name=job.name), metadata=site.metadata)
        ended = await asyncio.wait_for(site.ended(job.name), 60.0)
    assert event.attempt_change.reason == "TOO_FEW_RANKS"
    assert "takes at least 2 ranks, this worker has 1" in event.attempt_change.message
    assert ended.state == FineTuningJob.STATE_CANCELLED


async def test_a_job_whose_steps_have_no_work_for_its_ranks_fails_before_it_is_trained(
    site: Site, model_folder: Path, children: Children
) -> None:
    async with working(site, model_folder, crew_of(children, 2)):
        job = await site.ended((await site.create_job("idle", wanted(micro_batch_tokens=4096))).name)
    assert job.state == FineTuningJob.STATE_FAILED
    failure = status_to_failure(job.error)
    assert (failure.reason, failure.code) == ("TOO_MANY_RANKS", "FAILED_PRECONDITION")
    assert "at most the 1 forward passes of the largest step, got 2" in failure.message
