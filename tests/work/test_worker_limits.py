"""Several tasks at once, how long each may take, and what becomes of a runner that hangs."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from tests.work.conftest import uid_of
from tests.work.hosted import KINDS, Site, serve

from luthier.errors import AlreadyExists, FailedPrecondition
from luthier.work import place as place_module
from luthier.work import running
from luthier.work.context import TaskContext
from luthier.work.limits import LIMITS, Limits, allowed_seconds, answering_seconds
from luthier.work.running import RunnerStuck
from luthier.work.tasks import TaskKind
from luthier.work.worker import work_until
from luthier.worker.v1 import task_pb2


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with serve(tmp_path / "home") as served:
        yield served


def done(context: TaskContext) -> task_pb2.TaskResult:
    if context.task.HasField("register_model"):
        return task_pb2.TaskResult(register_model=task_pb2.RegisterModelResult())
    return task_pb2.TaskResult(train=task_pb2.TrainResult(step=1))


async def test_two_tasks_of_a_kind_run_at_once(site: Site) -> None:
    meeting = threading.Barrier(2, timeout=15)

    def run(context: TaskContext) -> task_pb2.TaskResult:
        meeting.wait()
        return done(context)

    for name in "ab":
        await site.enqueue(f"jobs/{name}", TaskKind.REGISTER_MODEL)
    async with site.worker(run):
        await site.until(lambda: site.states.count("SUCCEEDED") == 2)


async def test_one_training_at_a_time_and_a_registration_beside_it(site: Site) -> None:
    running_now: list[str] = []
    most: list[int] = []
    go_on = threading.Event()

    def run(context: TaskContext) -> task_pb2.TaskResult:
        if context.task.WhichOneof("spec") == "train":
            running_now.append(context.task.subject)
            most.append(len(running_now))
            go_on.wait(20)
            running_now.remove(context.task.subject)
        return done(context)

    await site.enqueue("jobs/a")
    await site.enqueue("jobs/b")
    async with site.worker(run):
        await site.until(lambda: running_now == ["jobs/a"])
        await site.enqueue("models/m", TaskKind.REGISTER_MODEL)
        await site.until(lambda: "SUCCEEDED" in site.states)
        assert running_now == ["jobs/a"]
        go_on.set()
        await site.until(lambda: site.states.count("SUCCEEDED") == 3)
    assert most == [1, 1]


async def test_a_task_that_outlasts_its_announced_work_fails_and_is_not_repeated(site: Site) -> None:
    def run(context: TaskContext) -> task_pb2.TaskResult:
        while True:
            context.check()
            time.sleep(0.01)

    short = Limits(stall_seconds=30.0, base_seconds=0.3)
    await site.enqueue()
    async with site.worker(run, limits=dict.fromkeys(KINDS, short)):
        await site.until(lambda: "FAILED" in site.states)
    (failure,) = site.handler.failures
    assert (failure.code, failure.reason) == ("DEADLINE_EXCEEDED", "TASK_DEADLINE")
    assert failure.message.startswith("jobs/a took longer than the 0 s that its work permits")
    assert site.handler.calls == [("started", 1), ("FAILED", 1)]


async def test_time_that_a_task_waits_for_the_service_is_not_its_own(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    has = site.blobs.has

    async def slow(digest: str) -> bool:
        await asyncio.sleep(1.0)
        return await has(digest)

    monkeypatch.setattr(site.blobs, "has", slow)

    def run(context: TaskContext) -> task_pb2.TaskResult:
        path = context.scratch / "f"
        path.write_bytes(b"x")
        context.store(path, "f")
        context.check()
        return done(context)

    await site.enqueue()
    async with site.worker(run, limits=dict.fromkeys(KINDS, Limits(stall_seconds=0.5, base_seconds=0.8))):
        await site.until(lambda: "SUCCEEDED" in site.states or "FAILED" in site.states)
    assert site.handler.failures == []


async def test_a_runner_that_stands_still_is_lost_and_its_process_ends(site: Site, tmp_path: Path) -> None:
    pipe = tmp_path / "x.index.json"
    os.mkfifo(pipe)
    gave_back = threading.Event()

    def run(context: TaskContext) -> task_pb2.TaskResult:
        if context.task.WhichOneof("spec") == "register_model":
            try:
                while True:
                    context.check()
                    time.sleep(0.01)
            finally:
                gave_back.set()
        pipe.read_bytes()  # nobody writes into it
        return done(context)

    await site.enqueue("models/m", TaskKind.REGISTER_MODEL)
    await site.enqueue("jobs/a")
    limits = dict.fromkeys(KINDS, Limits(stall_seconds=0.5))
    settings = replace(site.settings(), limits=limits)
    with pytest.raises(RunnerStuck, match="jobs/a neither goes on nor ends"):
        await asyncio.wait_for(work_until(settings, dict.fromkeys(KINDS, run), asyncio.Event()), 30)
    assert gave_back.is_set(), "what else ran was given back"
    async with site.parts.database.reading() as connection:
        tasks = {
            name: await site.parts.queue._tasks.of_resource(connection, uid_of(name))
            for name in ("jobs/a", "models/m")
        }
    assert [(task.state, task.losses) for (task,) in tasks.values()] == [
        ("QUEUED", 1),
        ("QUEUED", 0),
    ]
    for _ in range(2):
        with pytest.raises(RunnerStuck):
            await asyncio.wait_for(work_until(settings, {TaskKind.TRAIN: run}, asyncio.Event()), 30)
    (failure,) = site.handler.failures
    assert failure.reason == "WORKER_LOST"
    assert "stood still for 0.5 s" in failure.message
    descriptor = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)  # lets the threads of this test end
    os.close(descriptor)


async def test_a_runner_that_computes_is_not_taken_for_one_that_stands_still(site: Site) -> None:
    def run(context: TaskContext) -> task_pb2.TaskResult:
        end = time.monotonic() + 2.0
        while time.monotonic() < end:
            sum(range(10_000))
        return done(context)

    await site.enqueue()
    async with site.worker(run, limits=dict.fromkeys(KINDS, Limits(stall_seconds=0.7))):
        await site.until(lambda: "SUCCEEDED" in site.states)


async def test_a_runner_that_never_looks_at_its_time_is_ended_with_its_process(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "OVERTIME_GRACE_SECONDS", 0.3)
    enough = threading.Event()

    def run(context: TaskContext) -> task_pb2.TaskResult:
        while not enough.is_set():
            sum(range(10_000))
        return done(context)

    await site.enqueue()
    settings = replace(
        site.settings(), limits=dict.fromkeys(KINDS, Limits(stall_seconds=5.0, base_seconds=0.2))
    )
    try:
        with pytest.raises(RunnerStuck):
            await asyncio.wait_for(work_until(settings, dict.fromkeys(KINDS, run), asyncio.Event()), 20)
    finally:
        enough.set()
    assert site.handler.failures[0].reason == "TASK_DEADLINE"


def test_what_a_task_may_take_grows_with_its_files_and_records() -> None:
    file = task_pb2.BlobFile(path="a", size_bytes=3 << 20)
    limits = Limits(stall_seconds=1.0, base_seconds=10.0, seconds_per_record=0.5, seconds_per_mib=2.0)
    shards = [task_pb2.Shard(file=file, num_rows=20), task_pb2.Shard(file=file, num_rows=10)]
    render = task_pb2.Task(render=task_pb2.RenderSpec(shards=shards))
    assert allowed_seconds(render, limits) == 10.0 + 15.0 + 12.0
    sources = [task_pb2.VersionSource(file=file)]
    build = task_pb2.Task(build_version=task_pb2.BuildVersionSpec(sources=sources))
    assert allowed_seconds(build, limits) == 16.0
    assert allowed_seconds(task_pb2.Task(train=task_pb2.TrainSpec()), LIMITS[TaskKind.TRAIN]) is None


async def test_a_second_process_of_an_id_on_this_home_harms_nothing(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(place_module, "PATIENCE_SECONDS", 0.3)
    began, go_on = threading.Event(), threading.Event()
    kept: list[bool] = []

    def run(context: TaskContext) -> task_pb2.TaskResult:
        (context.scratch / "half").write_bytes(b"work")
        began.set()
        go_on.wait(20)
        kept.append((context.scratch / "half").exists())
        return done(context)

    await site.enqueue()
    async with site.worker(run):
        await site.until(began.is_set)
        with pytest.raises(FailedPrecondition, match="worker 'w' runs already on this home") as caught:
            await work_until(site.settings(), {TaskKind.TRAIN: done}, asyncio.Event())
        assert caught.value.reason == "WORKER_ID_TAKEN"
        go_on.set()
        await site.until(lambda: "SUCCEEDED" in site.states)
    assert kept == [True]
    assert site.handler.calls == [("started", 1), ("SUCCEEDED", 1)]


async def test_a_second_process_of_an_id_on_another_machine_is_refused(tmp_path: Path) -> None:
    began, go_on = threading.Event(), threading.Event()

    def run(context: TaskContext) -> task_pb2.TaskResult:
        began.set()
        go_on.wait(20)
        return done(context)

    async with serve(tmp_path / "home", lease_seconds=1.5) as site:
        await site.enqueue()
        async with site.worker(run):
            await site.until(began.is_set)
            elsewhere = site.settings(work_folder=tmp_path / "elsewhere" / "w")
            with pytest.raises(AlreadyExists, match="another process works as 'w'"):
                await asyncio.wait_for(work_until(elsewhere, {TaskKind.TRAIN: done}, asyncio.Event()), 15)
            go_on.set()
            await site.until(lambda: "SUCCEEDED" in site.states)
        assert site.handler.calls == [("started", 1), ("SUCCEEDED", 1)]


async def test_a_process_that_finds_the_lock_free_takes_over_at_once(site: Site) -> None:
    began, go_on = threading.Event(), threading.Event()

    def run(context: TaskContext) -> task_pb2.TaskResult:
        began.set()
        go_on.wait(20)
        return done(context)

    await site.enqueue()
    settings = site.settings(drain_seconds=0.1)
    first = asyncio.create_task(work_until(settings, {TaskKind.TRAIN: run}, asyncio.Event()))
    await site.until(began.is_set)
    left = site.home / "work" / "w" / "left-by-the-first"
    left.mkdir()
    first.cancel()  # as good as kill -9: it says nothing to the service
    await asyncio.gather(first, return_exceptions=True)
    moment = time.monotonic()
    async with site.worker(done):
        await site.until(lambda: "SUCCEEDED" in site.states)
        assert not left.exists()
    assert time.monotonic() - moment < 15, "far less than the lease of 30 s"
    go_on.set()
    assert site.handler.calls[:2] == [("started", 1), ("lost", 1)]


async def test_work_that_shows_only_on_the_way_adds_to_what_a_task_may_take(site: Site) -> None:
    def run(context: TaskContext) -> task_pb2.TaskResult:
        context.announce(60.0)
        time.sleep(0.5)
        context.check()
        return done(context)

    limits = dict.fromkeys(KINDS, Limits(stall_seconds=30.0, base_seconds=0.2))
    await site.enqueue()
    async with site.worker(run, limits=limits):
        await site.until(lambda: "SUCCEEDED" in site.states or "FAILED" in site.states)
    assert site.handler.failures == []


async def test_heeding_is_no_sign_of_life(site: Site) -> None:
    """Who waits for somebody else's work may wait for ever."""
    stuck = threading.Event()

    def run(context: TaskContext) -> task_pb2.TaskResult:
        while not stuck.wait(0.1):
            context.heed()
        return done(context)

    await site.enqueue()
    settings = replace(site.settings(), limits=dict.fromkeys(KINDS, Limits(stall_seconds=1.0)))
    try:
        with pytest.raises(RunnerStuck):
            await asyncio.wait_for(work_until(settings, dict.fromkeys(KINDS, run), asyncio.Event()), 20)
    finally:
        stuck.set()


def test_what_answers_may_take_is_far_above_what_they_take() -> None:
    # A model of 7 billion weights on two slow cores: a token a second, a long prompt in some minutes.
    assert answering_seconds(2000, 256) == 2000 * (600.0 + 256.0)
    assert LIMITS[TaskKind.EVALUATE].base_seconds == 12 * 3600.0
