"""How a training of several ranks ends that is not wanted any more, or of which one goes wrong in its own process."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.training.executors.faulty_child import KILLS
from tests.training.executors.test_torchrun import crew_of, disturbed, is_running, ranks_of, wanted, working
from tests.training.worker.conftest import Site
from tests.training.worker.test_in_child import assert_placed, assert_same, changes, told_of, warnings

from luthier.errors.status import status_to_failure
from luthier.training.executors.torchrun import Crew, Torchrun
from luthier.training.executors.vigil import Bounds
from luthier.v1.event_pb2 import AttemptChange, Event
from luthier.v1.fine_tuning_job_pb2 import SHARDING_FSDP2, FineTuningJob
from luthier.v1.training_service_pb2 import CancelFineTuningJobRequest
from luthier.work.child_watch import Patience
from luthier.work.children import Children, Program
from luthier.work.context import TaskContext
from luthier.work.device import Setup

NEVER = 10_000.0
PATIENT = Bounds(still_seconds=NEVER, asleep_seconds=NEVER, apart_seconds=NEVER)
FAULTY = Path(__file__).with_name("faulty_child.py")


@dataclass
class Faulty:
    """Children whose ranks go wrong where a job's id says so."""

    children: Children


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faulty]:
    kills = tmp_path_factory.mktemp("kills") / "kills"
    kills.touch()
    setup = Setup(device="cpu", num_threads=1, log_level="INFO")
    program = Program(command=("-P", str(FAULTY)), setup=setup, environment={KILLS: str(kills)})
    with Children(program, oom_kills=lambda: kills.stat().st_size) as children:
        yield Faulty(children)


async def lost_and_made(site: Site, name: str) -> tuple[list[Event], float]:
    """Return the events of a job to its end, and the seconds from its last step before it was lost until then."""
    events: list[Event] = []
    step_at, seconds = 0.0, 0.0
    async with asyncio.timeout(60.0):
        async for event in site.watch(name):
            events.append(event)
            if event.HasField("metrics"):
                step_at = time.monotonic()
            if event.attempt_change.kind == AttemptChange.KIND_LOST:
                seconds = time.monotonic() - step_at
    return events, seconds


@contextmanager
def ended_at_last(pids: Sequence[int]) -> Iterator[None]:
    """End processes after a block, whatever comes of it: a worker would wait for them."""
    try:
        yield
    finally:
        for pid in filter(is_running, pids):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


async def stopped(pids: Sequence[int]) -> None:
    """Stop processes, and wait until whoever watches them has seen that they stand: what moved was a sign of life."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    await asyncio.sleep(2.5)


@pytest.mark.parametrize("listens", [True, False])
async def test_ranks_are_cancelled_within_ten_seconds(
    site: Site, model_folder: Path, faulty: Faulty, *, listens: bool
) -> None:
    """Those that do not listen are stopped, and would not be found by what they show."""
    crew = Torchrun(faulty.children, Crew(num_ranks=2, num_threads=1, bounds=PATIENT))
    async with working(site, model_folder, crew):
        job = await site.create_job("one", wanted(num_epochs=5000))
        async for event in site.watch(job.name):
            if event.HasField("metrics"):
                break
        pids = ranks_of(site)
        assert len(pids) == 2
        with ended_at_last(pids):
            if not listens:
                await stopped(pids)
            async with asyncio.timeout(10.0):
                request = CancelFineTuningJobRequest(name=job.name)
                await site.jobs.CancelFineTuningJob(request, metadata=site.metadata)
                ended = await site.ended(job.name)
            assert not any(map(is_running, pids))
        events = [event async for event in site.watch(job.name)]
    assert ended.state == FineTuningJob.STATE_CANCELLED
    assert [kind for kind, _ in changes(events)] == [AttemptChange.KIND_CANCELLED]


async def test_a_rank_that_waits_for_itself_loses_the_attempt_within_ten_seconds_and_no_bit(
    site: Site, model_folder: Path, faulty: Faulty
) -> None:
    """It beats, and computes nothing. Where it is, events say."""
    async with working(site, model_folder, crew_of(faulty.children, 2)):
        whole = await site.ended((await site.create_job("whole", wanted())).name)
        job = await site.create_job("deadlocks-0", wanted())
        events, seconds = await lost_and_made(site, job.name)
        ended = await site.ended(job.name)
        await assert_same(site, whole.name, job.name)
    assert (ended.state, ended.num_attempts) == (FineTuningJob.STATE_SUCCEEDED, 2), ended.error
    assert changes(events)[0] == (AttemptChange.KIND_LOST, "STALLED")
    why = told_of(events, AttemptChange.KIND_LOST)
    assert "rank 0 of 2 hangs: " in why
    assert "it sleeps for 4 s in a wait that nothing in it ends" in why
    assert_placed(why)
    assert 4.0 < seconds < 10.0
    [where] = warnings(events)
    assert where.startswith("rank 0: the process that does the work hangs:\n")
    assert "in deadlocks" in where


async def test_a_rank_that_computes_for_ever_is_found_and_says_where(
    site: Site, model_folder: Path, faulty: Faulty
) -> None:
    """The first rank waits for it, and would else be the one that is looked into."""
    patience = Patience(silent_seconds=5.0)
    crew = Torchrun(faulty.children, Crew(num_ranks=2, num_threads=1, patience=patience))
    async with working(site, model_folder, crew):
        job = await site.create_job("spins-1", wanted())
        events, seconds = await lost_and_made(site, job.name)
        ended = await site.ended(job.name)
    assert (ended.state, ended.num_attempts) == (FineTuningJob.STATE_SUCCEEDED, 2), ended.error
    assert changes(events)[0] == (AttemptChange.KIND_LOST, "STALLED")
    why = told_of(events, AttemptChange.KIND_LOST)
    assert "rank 1 of 2 hangs: " in why
    assert "came to no end of a step" in why
    assert 5.0 < seconds < 20.0
    [where] = [text for text in warnings(events) if "in spins" in text]
    assert where.startswith("rank 1: the process that does the work hangs:\n")


async def test_a_driver_that_takes_its_time_is_no_sleep_of_a_rank(
    site: Site, model_folder: Path, faulty: Faulty, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files come slowly, and a checkpoint is stored slowly: a rank waits for it, and the other one for that."""
    slowed = []

    def slow(name: str) -> None:
        real = getattr(TaskContext, name)

        def called(context: TaskContext, *arguments: Any) -> Any:
            if name not in slowed:
                slowed.append(name)
                time.sleep(4.0)
            return real(context, *arguments)

        monkeypatch.setattr(TaskContext, name, called)

    for name in ("fetch_into", "checkpoint_stored"):
        slow(name)
    crew = Torchrun(faulty.children, Crew(num_ranks=2, num_threads=1, bounds=Bounds(asleep_seconds=2.5)))
    async with working(site, model_folder, crew):
        job = await site.create_job("slow", wanted(max_steps=7))
        events, _ = await lost_and_made(site, job.name)
        ended = await site.ended(job.name)
    assert slowed == ["fetch_into", "checkpoint_stored"]
    assert (ended.state, ended.num_attempts) == (FineTuningJob.STATE_SUCCEEDED, 1), changes(events)


async def test_a_kill_of_a_rank_for_want_of_memory_fails_the_job(
    site: Site, model_folder: Path, faulty: Faulty
) -> None:
    """The other one complains first, that it does not reach it any more."""
    async with working(site, model_folder, crew_of(faulty.children, 2)):
        hurt = await disturbed(site, "vanishes-1", lambda _: None)
    assert hurt.job.state == FineTuningJob.STATE_FAILED
    failure = status_to_failure(hurt.job.error)
    assert failure.reason == "OUT_OF_MEMORY"
    assert "ended by the kernel for want of memory" in failure.message
    assert "with micro_batch_tokens 48 it does not" in failure.message
    assert_placed(failure.message)
    assert changes(hurt.events) == [(AttemptChange.KIND_FAILED, "OUT_OF_MEMORY")]
    assert not any(map(is_running, hurt.pids))


async def test_a_divided_trial_that_lacks_memory_on_one_rank_fails_the_job_and_nothing_smaller_is_tried(
    site: Site, model_folder: Path, faulty: Faulty
) -> None:
    """The other rank waits within the pass."""
    job = wanted()
    job.sharding = SHARDING_FSDP2
    async with working(site, model_folder, crew_of(faulty.children, 2)):
        async with asyncio.timeout(60.0):
            ended = await site.ended((await site.create_job("short-1", job)).name)
        events = [event async for event in site.watch(ended.name)]
    assert ended.state == FineTuningJob.STATE_FAILED
    assert status_to_failure(ended.error).reason == "OUT_OF_MEMORY"
    assert changes(events) == [(AttemptChange.KIND_FAILED, "OUT_OF_MEMORY")]
    assert not [text for text in warnings(events) if "something smaller" in text]
