"""Files that a worker gives its service by a folder that both see, and by sending bytes where they see none."""

from __future__ import annotations

import hashlib
import os
import pkgutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import IO, Any

import pytest
from tests.work.hosted import Site, serve
from tests.work.test_servicer import claimed, refusal

from luthier.storage import disk
from luthier.storage.inbox import copy_into, place_beside
from luthier.work import servicer
from luthier.work.context import TaskContext
from luthier.work.session import TaskSession
from luthier.worker.v1 import task_pb2
from luthier.worker.v1 import worker_service_pb2 as W  # noqa: N812

BYTES = os.urandom((2 << 20) + 5)
DIGEST = hashlib.sha256(BYTES).hexdigest()


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with serve(tmp_path / "home") as served:
        yield served


class Sent:
    """Counts the pieces of blobs that workers send."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_pieces = 0
        chunks = TaskSession._chunks

        async def counted(session: TaskSession, *arguments: Any) -> AsyncIterator[W.PutBlobRequest]:
            async for one in chunks(session, *arguments):
                self.num_pieces += 1
                yield one

        monkeypatch.setattr(TaskSession, "_chunks", counted)


async def store_in_a_task(site: Site) -> None:
    def run(context: TaskContext) -> task_pb2.TaskResult:
        path = context.scratch / "weights"
        path.write_bytes(BYTES)
        files = [context.store(path, "weights"), context.store(path, "again")]
        assert path.read_bytes() == BYTES
        return task_pb2.TaskResult(train=task_pb2.TrainResult(files=files, step=6))

    await site.enqueue()
    async with site.worker(run):
        await site.until(lambda: "SUCCEEDED" in site.states or "FAILED" in site.states)
    assert site.handler.failures == []
    assert await site.blobs.read_bytes(DIGEST) == BYTES
    incoming = site.home.glob("**/blobs/incoming/*")
    assert all(path.suffix == ".mark" for path in incoming)


async def test_a_worker_that_sees_the_folder_sends_no_bytes(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = Sent(monkeypatch)
    await store_in_a_task(site)
    assert sent.num_pieces == 0


async def test_a_worker_elsewhere_is_told_of_no_folder_and_sends_bytes(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(servicer, "_is_near", lambda _: False)
    sent = Sent(monkeypatch)
    await store_in_a_task(site)
    assert sent.num_pieces == 3


async def test_what_is_not_taken_is_sent(
    site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("luthier.work.session.copy_into", lambda *_: True)  # an empty copy
    sent = Sent(monkeypatch)
    await store_in_a_task(site)
    assert sent.num_pieces == 3
    assert "a file was not taken, its bytes are sent" in caplog.text


@pytest.mark.parametrize(
    "what", ["luthier.work.session.copy_into", "luthier.storage.local_blobs.LocalBlobStore.take"]
)
async def test_a_full_disk_gives_the_task_back_and_no_bytes_are_sent(
    site: Site, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.setattr(disk, "_RETRY_SECONDS", 0.5)
    real, num_tries = pkgutil.resolve_name(what), 0

    def full_at_first(*arguments: Any, **named: Any) -> Any:
        nonlocal num_tries
        num_tries += 1
        if num_tries == 1:
            raise disk.disk_full("No space left on device")
        return real(*arguments, **named)

    monkeypatch.setattr(what, full_at_first)
    sent = Sent(monkeypatch)
    await store_in_a_task(site)
    assert (num_tries, sent.num_pieces) == (2, 0)


async def test_a_copy_leaves_the_floor_of_blobs_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    floors = []

    def noted(file: IO[bytes], source: Path, min_free_bytes: int) -> bool:
        floors.append(min_free_bytes)
        return copy_into(file, source, min_free_bytes)

    monkeypatch.setattr("luthier.work.session.copy_into", noted)
    async with serve(tmp_path / "home", min_free_bytes=16 << 20) as floored:
        await store_in_a_task(floored)
    assert floors == [1 << 20]


async def test_a_copy_is_taken_from_who_holds_the_lease_alone(site: Site, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(BYTES)
    async with site.wire() as (stub, metadata):
        task = await claimed(stub, metadata, site)
        head = {"task": task.task, "epoch": task.epoch, "sha256": DIGEST}
        wanted = W.GrantBlobRequest(task=task.task, epoch=task.epoch, sha256=[DIGEST])
        granted = await stub.GrantBlob(wanted, metadata=metadata)
        with place_beside(Path(granted.inbox)) as file:
            assert file is not None
            assert copy_into(file, source)
            name = Path(file.name).name
            for changes, words in (
                ({"epoch": task.epoch + 1}, "not leased"),
                ({"data": b"x"}, "data must be empty beside left_in_inbox, got 1 bytes"),
                ({"left_in_inbox": "../x"}, "must be 32 lowercase hex digits, got '../x'"),
                ({"left_in_inbox": "f" * 32}, "must be in its inbox, there is none"),
            ):
                request = W.PutBlobRequest(**{**head, "left_in_inbox": name, **changes})
                error = await refusal(stub.PutBlob(iter([request]), metadata=metadata))
                assert words in error.message
            request = W.PutBlobRequest(**head, left_in_inbox=name)
            answers = [await stub.PutBlob(iter([request]), metadata=metadata) for _ in range(2)]
        assert [one.size_bytes for one in answers] == [len(BYTES)] * 2, "also where the first answer was lost"
        again = await stub.GrantBlob(wanted, metadata=metadata)
    assert (list(again.missing_sha256), again.inbox) == ([], "")


@pytest.mark.parametrize(
    ("peer", "is_near"),
    [
        ("ipv4:127.0.0.1:50000", True),
        ("ipv6:%5B::1%5D:50000", True),
        ("unix:/run/x", True),
        ("ipv4:10.0.0.7:50000", False),
        ("ipv6:%5Bfe80::1%5D:50000", False),
        ("", False),
    ],
)
def test_who_is_near_came_by_this_machines_own_network(peer: str, is_near: bool) -> None:
    assert servicer._is_near(peer) is is_near
