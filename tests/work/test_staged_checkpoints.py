"""Checkpoints that are stored while the work goes on: nothing waits for them, and what goes wrong with one is heard."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from tests.work.hosted import Site, serve

from luthier.errors import InvalidArgument, LuthierError
from luthier.work import context as context_module
from luthier.work.context import TaskContext
from luthier.work.session import TaskSession
from luthier.worker.v1 import task_pb2


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with serve(tmp_path / "home") as served:
        yield served


class Held:
    """Holds back commits of checkpoints until it is told to let them through."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun = threading.Event()
        self.may_end = threading.Event()
        commit = TaskSession.commit_checkpoint

        async def held(session: TaskSession, *arguments: Any) -> str:
            self.begun.set()
            await asyncio.to_thread(self.may_end.wait)
            return await commit(session, *arguments)

        monkeypatch.setattr(TaskSession, "commit_checkpoint", held)


def weights(context: TaskContext) -> Path:
    path = context.scratch / "weights"
    path.write_bytes(b"weights")
    return path


async def test_work_goes_on_while_a_checkpoint_is_stored(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(monkeypatch)

    def run(context: TaskContext) -> task_pb2.TaskResult:
        context.begin_checkpoint(5, [weights(context)], {"train_loss": 0.5})
        assert held.begun.wait(10)
        context.metrics(6, {"train_loss": 0.4})
        context.check()
        assert not context.is_waiting
        held.may_end.set()
        files = context.checkpoint_stored()
        assert [file.path for file in files] == ["weights"]
        return task_pb2.TaskResult(train=task_pb2.TrainResult(files=files, step=6))

    await site.enqueue()
    async with site.worker(run):
        await site.until(lambda: "SUCCEEDED" in site.states or "FAILED" in site.states)
    assert site.handler.failures == []
    assert ("checkpointed", 5) in site.handler.calls


async def test_what_the_service_refuses_of_it_is_heard_by_the_work(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[str] = []

    async def refuse(*_: Any) -> str:
        raise InvalidArgument("the service wants none of it")

    monkeypatch.setattr(TaskSession, "commit_checkpoint", refuse)

    def run(context: TaskContext) -> task_pb2.TaskResult:
        context.begin_checkpoint(5, [weights(context)], {})
        try:
            while True:
                context.check()
        except LuthierError as error:
            heard.append(error.message)
            raise

    await site.enqueue()
    async with site.worker(run):
        await site.until(lambda: "FAILED" in site.states)
    assert heard == ["the service wants none of it"]


@pytest.mark.parametrize("is_released", [True, False])
async def test_one_that_is_being_stored_when_the_work_fails_is_left_in_peace_for_a_while(
    site: Site, monkeypatch: pytest.MonkeyPatch, is_released: bool
) -> None:
    held = Held(monkeypatch)
    monkeypatch.setattr(context_module, "_LEAVE_SECONDS", 0.5 if not is_released else 10.0)

    def run(context: TaskContext) -> task_pb2.TaskResult:
        try:
            context.begin_checkpoint(5, [weights(context)], {})
            assert held.begun.wait(10)
            raise InvalidArgument("the work cannot go on")
        finally:
            if is_released:
                threading.Timer(0.2, held.may_end.set).start()
            context.leave_checkpoint()

    await site.enqueue()
    async with site.worker(run):
        await site.until(lambda: "FAILED" in site.states)
        held.may_end.set()
    assert (("checkpointed", 5) in site.handler.calls) == is_released
    assert [failure.message for failure in site.handler.failures] == ["the work cannot go on"]


async def test_who_waits_for_one_hears_that_the_work_is_wanted_no_more(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, waited = Held(monkeypatch), list[str]()

    def run(context: TaskContext) -> task_pb2.TaskResult:
        context.begin_checkpoint(5, [weights(context)], {})
        try:
            context.checkpoint_stored(refuse)
        except InvalidArgument as error:
            waited.append(error.message)
            held.may_end.set()
            return task_pb2.TaskResult(train=task_pb2.TrainResult(files=context.checkpoint_stored(), step=5))
        raise AssertionError("it did not hear")

    def refuse() -> None:
        raise InvalidArgument("another rank is lost")

    await site.enqueue()
    async with site.worker(run):
        await site.until(lambda: "SUCCEEDED" in site.states or "FAILED" in site.states)
    assert waited == ["another rank is lost"]
    assert ("checkpointed", 5) in site.handler.calls, "it went on being stored"
