"""A pause reaches a worker's runner: at once before it begins, and where it likes once it has asked."""

from __future__ import annotations

import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.work.conftest import uid_of
from tests.work.hosted import Site, serve

from luthier.work.context import TaskContext, TaskPaused
from luthier.worker.v1 import task_pb2


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with serve(tmp_path / "home") as served:
        yield served


async def pause(site: Site) -> None:
    async with site.parts.database.transaction() as connection:
        await site.parts.queue.request_pause(connection, uid_of("jobs/a"))


async def cancel(site: Site) -> None:
    async with site.parts.database.transaction() as connection:
        await site.parts.queue.request_cancel(connection, uid_of("jobs/a"))


async def test_a_runner_that_never_asked_ends_for_a_pause_at_once(site: Site) -> None:
    """With the first report after it: the next heartbeat is ten seconds away."""
    began = threading.Event()

    def run(context: TaskContext) -> task_pb2.TaskResult:
        began.set()
        while True:
            context.progress("reading", 1, 2, "rows")
            context.check()
            time.sleep(0.01)

    await site.enqueue()
    async with site.worker(run):
        await site.until(began.is_set)
        asked_at = time.monotonic()
        await pause(site)
        await site.until(lambda: "paused" in site.states)
        assert time.monotonic() - asked_at < 5.0
    assert site.states == ["started", *["reported"] * (len(site.states) - 2), "paused"]


async def test_a_runner_that_has_asked_pauses_where_it_likes(site: Site) -> None:
    asked = threading.Event()
    steps: list[int] = []

    def run(context: TaskContext) -> task_pb2.TaskResult:
        for step in range(1, 1000):
            context.metrics(step, {"train_loss": 1.0})
            context.check()
            steps.append(step)
            if context.pausing():
                (context.scratch / "state").write_bytes(b"state")
                file = context.store(context.scratch / "state", "state")
                context.commit_checkpoint(step, [file], {})
                raise TaskPaused
            asked.set()
            time.sleep(0.02)
        raise AssertionError("it was asked to pause")

    await site.enqueue()
    async with site.worker(run):
        await site.until(asked.is_set)
        await pause(site)
        await site.until(lambda: "paused" in site.states)
    assert ("checkpointed", steps[-1]) in site.handler.calls, "the step was ended before"


async def test_a_cancel_comes_before_a_pause(site: Site) -> None:
    asked = threading.Event()

    def run(context: TaskContext) -> task_pb2.TaskResult:
        context.pausing()
        asked.set()
        while True:
            context.progress("training", 1, 2, "steps")
            context.check()
            time.sleep(0.01)

    await site.enqueue()
    async with site.worker(run):
        await site.until(asked.is_set)
        await pause(site)
        await cancel(site)
        await site.until(lambda: "CANCELLED" in site.states)
    assert "paused" not in site.states
