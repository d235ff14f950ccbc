"""A worker against a service that fails, refuses and forgets: nothing is lost for a fault that passes."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tests.work.hosted import Site, serve

from luthier.errors import FailedPrecondition, LuthierError, ResourceExhausted, Unavailable
from luthier.work import link as link_module
from luthier.work.context import TaskContext
from luthier.worker.v1 import task_pb2


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with serve(tmp_path / "home") as served:
        yield served


def done(context: TaskContext) -> task_pb2.TaskResult:
    return task_pb2.TaskResult(train=task_pb2.TrainResult(step=1))


class Failing:
    """A method that raises what it is given before it works again."""

    def __init__(self, works: Callable[..., Any], *errors: Exception) -> None:
        self.works = works
        self.errors = list(errors)

    async def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.errors:
            raise self.errors.pop(0)
        return await self.works(*args, **kwargs)


def faults() -> list[Exception]:
    return [
        KeyError("a fault of the service"),  # INTERNAL
        LuthierError("nobody knows"),  # UNKNOWN
        ResourceExhausted("Concurrent RPC limit exceeded!", retry_after_seconds=0.2),
        Unavailable("away"),
    ]


async def test_faults_that_pass_cost_neither_the_job_nor_an_event(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = site.parts.queue
    for method in ("finish", "report", "commit_checkpoint", "heartbeat"):
        monkeypatch.setattr(queue, method, Failing(getattr(queue, method), *faults()))
    monkeypatch.setattr(site.blobs, "put", Failing(site.blobs.put, *faults()))
    monkeypatch.setattr(site.blobs, "has", Failing(site.blobs.has, *faults()))

    def run(context: TaskContext) -> task_pb2.TaskResult:
        for number in range(300):
            context.log(str(number))
        path = context.scratch / "weights"
        path.write_bytes(b"weights")
        file = context.store(path, "weights")
        context.commit_checkpoint(5, [file], {})
        context.log("last")
        return task_pb2.TaskResult(train=task_pb2.TrainResult(files=[file], step=1))

    await site.enqueue()
    async with site.worker(run):
        await site.until(lambda: "SUCCEEDED" in site.states or "FAILED" in site.states, 60)
    assert site.handler.failures == []
    assert site.states.count("SUCCEEDED") == 1
    assert await site.texts() == [*(str(number) for number in range(300)), "last"]


async def test_a_thousand_watches_without_a_key_cost_a_running_job_no_event(site: Site) -> None:
    began, go_on = threading.Event(), threading.Event()

    def run(context: TaskContext) -> task_pb2.TaskResult:
        began.set()
        go_on.wait(60)
        for number in range(1000):
            context.log(str(number))
            context.metrics(number, {"train_loss": 1.0})
        path = context.scratch / "weights"
        path.write_bytes(b"weights")
        context.commit_checkpoint(1000, [context.store(path, "weights")], {})
        return done(context)

    await site.enqueue("jobs/a")
    async with aio.insecure_channel(site.address) as channel, site.worker(run):
        await site.until(began.is_set)
        health = health_pb2_grpc.HealthStub(channel)
        watches = [health.Watch(health_pb2.HealthCheckRequest()) for _ in range(1000)]
        answers = await asyncio.gather(*(watch.read() for watch in watches), return_exceptions=True)
        refused = [answer for answer in answers if isinstance(answer, aio.AioRpcError)]
        assert {error.code() for error in refused} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        go_on.set()
        await site.until(lambda: "SUCCEEDED" in site.states or "FAILED" in site.states, 60)
        # The next one, too, is claimed while they stand.
        await site.enqueue("jobs/b")
        await site.until(lambda: site.states.count("SUCCEEDED") == 2, 60)
        standing = [watch for watch in watches if not watch.done()]
        assert len(standing) == len(watches) - len(refused) > 0
        for watch in standing:
            watch.cancel()
    assert site.handler.failures == []
    for subject in ("jobs/a", "jobs/b"):
        assert await site.texts(subject) == [str(number) for number in range(1000)]
    assert site.states.count("checkpointed") == 2
    assert sum(number for state, number in site.handler.calls if state == "reported") >= 4000


async def test_an_event_that_is_refused_is_dropped_alone_and_told(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    def run(context: TaskContext) -> task_pb2.TaskResult:
        for number in range(50):
            context.log(str(number))
            if number in (20, 33):
                context.metrics(number, {"train_loss": float("nan")})
        return done(context)

    await site.enqueue()
    async with site.worker(run):
        await site.until(lambda: "SUCCEEDED" in site.states)
    texts = await site.texts()
    assert [text for text in texts if text.isdigit()] == [str(number) for number in range(50)]
    (told,) = [text for text in texts if not text.isdigit()]
    assert "train_loss" in told
    assert "must be a finite number, got nan" in told
    counted = [
        vars(record)["number"] for record in caplog.records if record.message.startswith("report refused")
    ]
    assert counted == [1, 2]


async def test_a_fault_that_lasts_fails_the_task_by_name(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "FAULT_SECONDS", 0.5)
    finish = site.parts.queue.finish

    async def refuse_results(task_id: str, epoch: int, outcome: Any, require_blobs: Any) -> None:
        if outcome.result is not None:
            raise KeyError("cannot be stored")
        await finish(task_id, epoch, outcome, require_blobs)

    monkeypatch.setattr(site.parts.queue, "finish", refuse_results)
    await site.enqueue()
    async with site.worker(done):
        await site.until(lambda: "FAILED" in site.states)
    assert "the service refused the outcome of the task" in site.handler.failures[0].message


async def test_a_claim_that_fails_does_not_end_the_worker(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = FailedPrecondition("the service cannot hand out tasks", reason="RESOURCE_IN_USE")
    failing = Failing(site.parts.queue.claim, KeyError("a"), odd)
    monkeypatch.setattr(site.parts.queue, "claim", failing)
    await site.enqueue()
    async with site.worker(done):
        await site.until(lambda: "SUCCEEDED" in site.states)
    assert failing.errors == []


async def test_a_claim_whose_answer_is_lost_leases_one_task_once(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = site.parts.queue.claim
    lost: list[str] = []

    async def lose_first(*args: Any) -> Any:
        claimed = await claim(*args)
        if claimed is not None and not lost:
            lost.append(claimed[0].task_id)
            raise Unavailable("the connection broke")
        return claimed

    monkeypatch.setattr(site.parts.queue, "claim", lose_first)
    await site.enqueue("jobs/a")
    await site.enqueue("jobs/b")
    async with site.worker(done):
        await site.until(lambda: site.states.count("SUCCEEDED") == 2)
    assert len(lost) == 1
    assert site.handler.calls.count(("started", 1)) == 2, "no second attempt, no second lease"
    assert "lost" not in site.states


async def test_work_waits_through_an_overload_that_outlasts_a_lease(tmp_path: Path) -> None:
    began, go_on = threading.Event(), threading.Event()

    def run(context: TaskContext) -> task_pb2.TaskResult:
        began.set()
        go_on.wait(20)
        return done(context)

    async with serve(tmp_path / "home", lease_seconds=1.0) as site:
        full = [ResourceExhausted("full", retry_after_seconds=0.3) for _ in range(5)]
        site.parts.queue.finish = Failing(site.parts.queue.finish, *full)  # type: ignore[method-assign]
        await site.enqueue()
        async with site.worker(run):
            await site.until(began.is_set)
            go_on.set()
            await site.until(lambda: "SUCCEEDED" in site.states)
        assert site.handler.calls == [("started", 1), ("SUCCEEDED", 1)]


async def test_a_claim_answered_while_the_service_restarts_is_taken_up_by_the_same_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    async with AsyncExitStack() as worker:
        async with serve(home) as first:
            claim, leased = first.parts.queue.claim, threading.Event()

            async def lose(*args: Any) -> Any:
                claimed = await claim(*args)
                if claimed is not None:
                    leased.set()
                    raise Unavailable("the connection broke")
                return claimed

            monkeypatch.setattr(first.parts.queue, "claim", lose)
            await first.enqueue()
            await worker.enter_async_context(first.worker(done))
            await first.until(leased.is_set)
        async with serve(home, first.port) as second:
            await second.until(lambda: "SUCCEEDED" in second.states, 15)  # half a lease period
            assert second.handler.calls == [("SUCCEEDED", 1)], (
                "the first attempt, neither lost nor begun anew"
            )
            await worker.aclose()
