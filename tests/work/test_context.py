"""What a service hears of a task while a large file of it is fetched."""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest
from tests.work.conftest import uid_of
from tests.work.hosted import Site, serve

from luthier.v1.event_pb2 import Progress
from luthier.work import context as context_module
from luthier.work.context import TaskContext
from luthier.work.paced import Paced
from luthier.worker.v1 import task_pb2


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with serve(tmp_path / "home") as served:
        yield served


async def told_while_three_pieces_come(site: Site, monkeypatch: pytest.MonkeyPatch) -> list[Progress]:
    """The progress of a task that says it loads a model, and fetches one file of it."""
    given = await site.blobs.put_bytes(b"abc")

    async def pieces(digest: str, **_: object) -> AsyncIterator[bytes]:
        assert digest == given.digest
        for piece in (b"a", b"b", b"c"):
            yield piece

    monkeypatch.setattr(site.blobs, "read", pieces)

    def run(context: TaskContext) -> task_pb2.TaskResult:
        context.progress("loading model", 1, 6, "files")
        fetched = context.fetch(task_pb2.BlobFile(path="x", sha256=given.digest, size_bytes=3))
        assert fetched.read_bytes() == b"abc"
        return task_pb2.TaskResult(train=task_pb2.TrainResult(step=1))

    await site.enqueue()
    async with site.worker(run):
        await site.until(lambda: "SUCCEEDED" in site.states)
    async with site.parts.database.reading() as connection:
        events = await site.parts.log.read(connection, uid_of("jobs/a"), 1, 100)
    return [event.progress for event in events if event.HasField("progress")]


async def test_a_long_fetch_says_again_what_the_task_is_at(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(context_module, "Paced", partial(Paced, 0.0))
    told = await told_while_three_pieces_come(site, monkeypatch)
    loading = Progress(phase="loading model", completed=1, total=6, unit="files")
    assert told == [loading] * 4, "once by itself, and with each piece"


async def test_a_short_fetch_says_nothing(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(await told_while_three_pieces_come(site, monkeypatch)) == 1
