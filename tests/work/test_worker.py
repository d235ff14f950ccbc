"""A real worker against a real service: everything arrives once, and nothing is lost on the way."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.work.conftest import uid_of
from tests.work.hosted import Site, serve

from luthier.errors import FailedPrecondition, Failure, InvalidArgument, Reason
from luthier.runtime.field_limits import DIGEST
from luthier.work.cache import BlobCache
from luthier.work.context import TaskContext, TaskFailed
from luthier.work.link import WorkerLink
from luthier.work.row_file import write_rows
from luthier.work.tasks import TaskKind
from luthier.work.worker import WorkerSettings, work_until
from luthier.worker.v1 import task_pb2


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with serve(tmp_path / "home") as served:
        yield served


def done(result: task_pb2.TaskResult | None = None) -> task_pb2.TaskResult:
    return result or task_pb2.TaskResult(train=task_pb2.TrainResult(step=1))


async def test_events_arrive_once_and_in_order(site: Site) -> None:
    def run(context: TaskContext) -> task_pb2.TaskResult:
        for number in range(500):
            context.log(str(number))
            context.metrics(number + 1, {"train_loss": 1.0})
        return done()

    await site.enqueue()
    async with site.worker(run):
        await site.until(lambda: "SUCCEEDED" in site.states)
    assert await site.texts() == [str(number) for number in range(500)]


async def test_files_go_both_ways_and_are_sent_once(site: Site) -> None:
    big = bytes(range(256)) * 12_000  # three chunks
    given = await site.blobs.put_bytes(b"from the service")

    def run(context: TaskContext) -> task_pb2.TaskResult:
        fetched = context.fetch(task_pb2.BlobFile(path="x", sha256=given.digest, size_bytes=given.size_bytes))
        assert fetched.read_bytes() == b"from the service"
        path = context.scratch / "big.bin"
        path.write_bytes(big)
        file = context.store(path, "big.bin")
        assert context.store(path, "again.bin").sha256 == file.sha256
        checkpoint = context.commit_checkpoint(7, [file], {"train_loss": 0.5})
        assert checkpoint == "jobs/a/checkpoints/7"
        write_rows(context.scratch / "drawn", [b"one", b"two"])
        context.commit_rollouts(8, context.scratch / "drawn")
        return done(task_pb2.TaskResult(train=task_pb2.TrainResult(files=[file])))

    await site.enqueue()
    async with site.worker(run):
        await site.until(lambda: "SUCCEEDED" in site.states)
    (rollouts,) = site.handler.rollouts
    assert (rollouts.step, rollouts.num_rollouts, rollouts.file.path) == (8, 2, "rollouts/step-8")
    assert (await site.blobs.read_bytes(rollouts.file.sha256))[:6] == b"onetwo"
    result = site.handler.results[0]
    assert result is not None
    assert await site.blobs.read_bytes(result.train.files[0].sha256) == big
    assert ("checkpointed", 7) in site.handler.calls
    assert list((site.home / "work" / "w").iterdir()) == [], "scratch folders are deleted"


@pytest.mark.parametrize(
    ("error", "code", "reason", "said"),
    [
        (
            InvalidArgument("bad record", reason="INVALID_RECORDS"),
            "INVALID_ARGUMENT",
            "INVALID_RECORDS",
            "bad record",
        ),
        (MemoryError("12 GB"), "RESOURCE_EXHAUSTED", "OUT_OF_MEMORY", "12 GB"),
        (KeyError("surprise"), "INTERNAL", "INTERNAL", "KeyError: 'surprise'"),
    ],
)
async def test_a_failure_keeps_its_reason(
    site: Site, error: Exception, code: str, reason: str, said: str
) -> None:
    def run(context: TaskContext) -> task_pb2.TaskResult:
        raise error

    await site.enqueue()
    async with site.worker(run):
        await site.until(lambda: "FAILED" in site.states)
    failure = site.handler.failures[0]
    assert (failure.code, failure.reason) == (code, reason)
    assert said in failure.message


async def test_a_failure_may_bring_a_part_of_its_result(site: Site) -> None:
    partial = task_pb2.TaskResult(train=task_pb2.TrainResult(step=5))

    def run(context: TaskContext) -> task_pb2.TaskResult:
        raise TaskFailed(InvalidArgument("bad"), partial)

    await site.enqueue()
    async with site.worker(run):
        await site.until(lambda: "FAILED" in site.states)
    assert site.handler.results == [partial]
    assert isinstance(site.handler.failures[0], Failure)


async def test_a_cancel_reaches_the_runner(site: Site) -> None:
    began = threading.Event()

    def run(context: TaskContext) -> task_pb2.TaskResult:
        began.set()
        while True:
            context.check()
            time.sleep(0.01)

    await site.enqueue()
    async with site.worker(run):
        await site.until(began.is_set)
        async with site.parts.database.transaction() as connection:
            await site.parts.queue.request_cancel(connection, uid_of("jobs/a"))
        await site.until(lambda: "CANCELLED" in site.states)


async def test_a_worker_that_stops_gives_its_task_back(site: Site) -> None:
    began = threading.Event()

    def run(context: TaskContext) -> task_pb2.TaskResult:
        began.set()
        while True:
            context.check()
            time.sleep(0.01)

    await site.enqueue()
    async with site.worker(run) as stopping:
        await site.until(began.is_set)
        stopping.set()
        await site.until(lambda: ("lost", 1) in site.handler.calls)
    async with site.worker(lambda context: done()):
        await site.until(lambda: "SUCCEEDED" in site.states)


async def test_an_outcome_whose_bytes_the_service_has_lost_is_a_lost_attempt(site: Site) -> None:
    absent = task_pb2.BlobFile(path="weights", sha256="0" * 64)

    def run(context: TaskContext) -> task_pb2.TaskResult:
        if context.task.attempt == 1:
            return done(task_pb2.TaskResult(train=task_pb2.TrainResult(files=[absent])))
        return done()

    await site.enqueue()
    async with site.worker(run):
        await site.until(lambda: "SUCCEEDED" in site.states)
    assert ("lost", 1) in site.handler.calls
    assert site.handler.failures == []


BAD_RESULTS: dict[str, tuple[task_pb2.TaskResult, str]] = {
    "a digest that is none": (
        task_pb2.TaskResult(
            train=task_pb2.TrainResult(files=[task_pb2.BlobFile(path="a", sha256="x")], step=1)
        ),
        "result.train.files[0].sha256: must be 64 lowercase hex digits, got 'x'",
    ),
    "another task's": (
        task_pb2.TaskResult(register_model=task_pb2.RegisterModelResult()),
        "result: must be train, as its task is, got register_model",
    ),
    "nothing": (task_pb2.TaskResult(), "result: must be one of register_model, train, got nothing"),
}


@pytest.mark.parametrize("case", sorted(BAD_RESULTS))
async def test_a_result_that_breaks_a_rule_fails_its_task_by_name(site: Site, case: str) -> None:
    bad, said = BAD_RESULTS[case]
    site.handler.result_limits.update({"files[].sha256": DIGEST})
    await site.enqueue()
    async with site.worker(lambda context: bad):
        await site.until(lambda: "FAILED" in site.states)
    (failure,) = site.handler.failures
    assert failure.message == f"the service refused the outcome of the task: {said}"
    assert site.states == ["started", "FAILED"], "nothing of the result was used"
    assert site.handler.results == [None]


async def test_a_worker_whose_outcome_is_refused_goes_on(site: Site) -> None:
    bad = BAD_RESULTS["nothing"][0]
    await site.enqueue()
    async with site.worker(lambda context: bad if context.task.subject == "jobs/a" else done()):
        await site.until(lambda: "FAILED" in site.states)
        await site.enqueue("jobs/b")
        await site.until(lambda: "SUCCEEDED" in site.states)


async def test_a_companion_that_fails_ends_the_worker(site: Site) -> None:
    async def companion(link: WorkerLink, cache: BlobCache) -> None:
        raise RuntimeError("out of order")

    settings = WorkerSettings(
        service_address=site.address,
        worker_id="w",
        credential=site.keys.worker_key,
        work_folder=site.home / "work",
        cache_folder=site.home / "cache",
        cache_bytes=1 << 20,
        companions=(companion,),
    )
    with pytest.raises(RuntimeError, match="out of order"):
        await asyncio.wait_for(work_until(settings, {TaskKind.TRAIN: lambda _: done()}, asyncio.Event()), 10)


async def test_a_lost_lease_ends_the_work_and_reports_nothing(site: Site) -> None:
    began, ended = threading.Event(), threading.Event()

    def run(context: TaskContext) -> task_pb2.TaskResult:
        began.set()
        try:
            while True:
                context.check()
                time.sleep(0.01)
        finally:
            if context.task.attempt == 1:  # the queue gives the task out again
                context.log("too late")
                ended.set()

    await site.enqueue()
    async with site.worker(run):
        await site.until(began.is_set)
        await site.parts.queue.release_worker("w", "another process")
        await site.until(ended.is_set)
        await asyncio.sleep(0.2)
    assert await site.texts() == []


async def test_work_goes_on_through_a_restart_of_the_service(tmp_path: Path) -> None:
    began, go_on = threading.Event(), threading.Event()

    def run(context: TaskContext) -> task_pb2.TaskResult:
        context.log("before")
        began.set()
        go_on.wait(30)
        context.log("after")
        return done()

    home = tmp_path / "home"
    async with serve(home) as first:
        await first.enqueue()
        working = first.worker(run)
        await working.__aenter__()
        await first.until(began.is_set)
        await asyncio.sleep(0.3)
    async with serve(home, first.port) as second:
        go_on.set()
        await second.until(lambda: "SUCCEEDED" in second.states)
        assert await second.texts() == ["before", "after"]
        assert second.handler.calls[-1] == ("SUCCEEDED", 1), "the same attempt"
        await second.enqueue("jobs/b")
        await second.until(lambda: second.states.count("SUCCEEDED") == 2)
        await working.__aexit__(None, None, None)


@pytest.mark.parametrize("how", ["cancel", "stop"])
async def test_a_runner_that_waits_for_a_file_hears_within_a_second(
    site: Site, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    given = await site.blobs.put_bytes(b"from the service")
    asked = threading.Event()

    async def silent(digest: str, **_: object) -> AsyncIterator[bytes]:
        asked.set()
        await asyncio.sleep(20)
        yield b""

    monkeypatch.setattr(site.blobs, "read", silent)

    def run(context: TaskContext) -> task_pb2.TaskResult:
        context.fetch(task_pb2.BlobFile(path="x", sha256=given.digest, size_bytes=given.size_bytes))
        return done()

    await site.enqueue()
    async with site.worker(run) as stopping:
        await site.until(asked.is_set)
        if how == "stop":
            stopping.set()
        else:
            async with site.parts.database.transaction() as connection:
                await site.parts.queue.request_cancel(connection, uid_of("jobs/a"))
        began = time.monotonic()
        await site.until(lambda: "CANCELLED" in site.states or "lost" in site.states)
        assert time.monotonic() - began < 2.0, "a heartbeat brings the wish, the wait hears it"


async def test_files_are_looked_for_where_nobody_can_sweep_them_away_any_more(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look and the commit a blob that was released could go."""
    has, looks = site.blobs.has, []

    async def seen(digest: str) -> bool:
        looks.append(site.parts.database._writing.locked())
        return await has(digest)

    monkeypatch.setattr(site.blobs, "has", seen)

    def run(context: TaskContext) -> task_pb2.TaskResult:
        path = context.scratch / "weights"
        path.write_bytes(b"weights")
        file = context.store(path, "weights")
        context.commit_checkpoint(1, [file], {})
        return task_pb2.TaskResult(train=task_pb2.TrainResult(files=[file]))

    await site.enqueue()
    async with site.worker(run):
        await site.until(lambda: "SUCCEEDED" in site.states)
    assert looks == [False, True, True], "before the file is sent, with the checkpoint, with the outcome"


async def test_rollouts_whose_bytes_went_meanwhile_are_sent_again(site: Site) -> None:
    gone = FailedPrecondition("given back with what was dropped", reason=Reason.BLOB_MISSING)
    site.handler.refusals["rollouts"] = gone

    def run(context: TaskContext) -> task_pb2.TaskResult:
        write_rows(context.scratch / "drawn", [b"one"])
        context.commit_rollouts(1, context.scratch / "drawn")
        return done()

    await site.enqueue()
    async with site.worker(run):
        await site.until(lambda: {"SUCCEEDED", "FAILED"} & {*site.states} != set())
    assert site.handler.failures == []
    assert [one.step for one in site.handler.rollouts] == [1]


async def test_a_file_of_something_else_is_no_rollouts(site: Site) -> None:
    def run(context: TaskContext) -> task_pb2.TaskResult:
        (context.scratch / "drawn").write_bytes(b"something else")
        context.commit_rollouts(1, context.scratch / "drawn")
        return done()

    await site.enqueue()
    async with site.worker(run):
        await site.until(lambda: "FAILED" in site.states)
    assert site.handler.failures[0].reason == "DATA_CORRUPTED"
    assert site.handler.rollouts == []
