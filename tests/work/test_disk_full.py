"""A task on a disk that fills up is given back, not failed, and goes on when there is room."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from tests.small_disk import fill, mounted
from tests.work.conftest import attempt_kind, uid_of
from tests.work.hosted import Site, serve

from luthier.errors import Internal
from luthier.storage import disk
from luthier.storage.disk import Disk
from luthier.work import running
from luthier.work.context import TaskContext, TaskFailed
from luthier.worker.v1 import task_pb2

pytestmark = pytest.mark.long
MIB = 1 << 20
FLOOR = 4 * MIB


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "FULL_SECONDS", 0.3)
    monkeypatch.setattr(disk, "_RETRY_SECONDS", 1.0)


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    with mounted(tmp_path / "small") as folder:
        yield folder


@pytest.fixture
async def site(small: Path) -> AsyncIterator[Site]:
    """A service and a worker whose whole home is on a small disk."""
    async with serve(small / "home", min_free_bytes=FLOOR) as served:
        yield served


def done() -> task_pb2.TaskResult:
    return task_pb2.TaskResult(train=task_pb2.TrainResult(step=1))


async def ended(site: Site) -> list[str]:
    """The final state, if the log has one."""
    async with site.parts.database.reading() as connection:
        events = await site.parts.log.read(connection, uid_of("jobs/a"), 1, 1000)
    return [event.state_change.state for event in events if event.HasField("state_change")]


async def losses(site: Site) -> list[tuple[str, str]]:
    """Every attempt's end, with its message, as its user reads it."""
    async with site.parts.database.reading() as connection:
        events = await site.parts.log.read(connection, uid_of("jobs/a"), 1, 1000)
    return [(kind, event.attempt_change.message) for event in events if (kind := attempt_kind(event))]


async def test_a_task_that_fills_the_workers_disk_is_given_back_and_done_later(
    site: Site, small: Path
) -> None:
    fillers: list[Path] = []

    def run(context: TaskContext) -> task_pb2.TaskResult:
        if len(fillers) < 5:  # more often than attempts may be lost
            fillers.append(context.scratch)
            with (context.scratch / "big").open("wb") as file:
                while True:
                    file.write(bytes(MIB))
        return done()

    await site.enqueue()
    async with site.worker(run):
        await site.until(lambda: "SUCCEEDED" in site.states or "FAILED" in site.states, 60)
    assert site.handler.failures == []
    assert site.states.count("lost") == 5
    ends = await losses(site)
    assert [kind for kind, _ in ends if kind == "LOST"] == ["LOST"] * 5
    assert "No space left on device" in ends[1][1]
    assert not any(path.exists() for path in fillers)


async def test_a_task_whose_checkpoint_finds_no_room_waits_for_it_and_goes_on(
    site: Site, small: Path
) -> None:
    filler: list[Path] = []
    attempts: list[int] = []

    def run(context: TaskContext) -> task_pb2.TaskResult:
        attempts.append(context.task.attempt)
        first, path = context.scratch / "first", context.scratch / "weights"
        first.write_bytes(b"first" * 1000)
        path.write_bytes(bytes([len(attempts)]) * (64 << 10))
        if not filler:
            context.commit_checkpoint(1, [context.store(first, "weights")], {})
            filler.append(fill(small, leave_bytes=128 << 10))
        context.commit_checkpoint(2, [context.store(path, "weights")], {})
        return done()

    await site.enqueue()
    async with site.worker(run):
        await site.until(lambda: "lost" in site.states)
        # There is no room: nobody takes it up again.
        await asyncio.sleep(2)
        assert attempts == [1]
        assert not Disk(small, FLOOR).has_room()
        filler[0].unlink()
        await site.until(lambda: "SUCCEEDED" in site.states or "FAILED" in site.states, 60)
    assert site.handler.failures == []
    assert attempts == [1, 2]
    assert [call for call in site.handler.calls if call[0] == "checkpointed"] == [
        ("checkpointed", 1),
        ("checkpointed", 2),
    ]
    assert "must stay free" in (await losses(site))[1][1]


async def test_an_outcome_that_the_full_database_cannot_take_is_told_again(site: Site, small: Path) -> None:
    filler: list[Path] = []

    def run(context: TaskContext) -> task_pb2.TaskResult:
        filler.append(fill(small))
        return done()

    await site.enqueue()
    async with site.worker(run):
        await site.until(lambda: bool(filler))
        await site.until(lambda: "SUCCEEDED" in site.states)
        await asyncio.sleep(1)
        # The handler was asked, time and again, and what it did was not committed.
        assert await ended(site) == []
        filler[0].unlink()
        async with asyncio.timeout(60):
            while not await ended(site):  # noqa: ASYNC110 - a worker brings it about
                await asyncio.sleep(0.1)
    assert await ended(site) == ["SUCCEEDED"]
    assert site.handler.failures == []
    assert site.states.count("started") == 1


async def test_a_task_that_fails_for_a_full_disk_with_a_part_of_its_result_is_given_back(
    tmp_path: Path,
) -> None:
    attempts: list[int] = []

    def run(context: TaskContext) -> task_pb2.TaskResult:
        attempts.append(context.task.attempt)
        if len(attempts) > 1:
            return done()
        full = Internal("the answers cannot be written")
        full.__cause__ = OSError(errno.ENOSPC, "No space left on device")
        raise TaskFailed(full, done())

    async with serve(tmp_path / "home") as roomy:
        await roomy.enqueue()
        async with roomy.worker(run):
            await roomy.until(lambda: "SUCCEEDED" in roomy.states or "FAILED" in roomy.states)
        assert roomy.handler.failures == []
        assert attempts == [1, 2]
