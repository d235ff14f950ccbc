"""A start costs no reading of what is uploaded: what was being finished is hashed beside calls, the rest at its end."""

from __future__ import annotations

import asyncio
import hashlib
import os
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.data.uploads.test_servicer import PROJECT, chunk, persisted, started, write

from luthier.errors import LuthierError
from luthier.storage.local_staging import LocalStaging
from luthier.v1 import data_service_pb2
from luthier.v1.upload_pb2 import Upload

DATA = bytes(range(256)) * 4096
DIGEST = hashlib.sha256(DATA).hexdigest()


class Reads:
    """Reads of staged bytes: counted, and held up until they are let go."""

    def __init__(self) -> None:
        self.count = 0
        self.began, self.go = threading.Event(), threading.Event()


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Reads]:
    made, real = Reads(), os.pread

    def held_up(descriptor: int, size_bytes: int, offset: int) -> bytes:
        made.count += 1
        made.began.set()
        assert made.go.wait(60)
        return real(descriptor, size_bytes, offset)

    monkeypatch.setattr(os, "pread", held_up)
    yield made
    made.go.set()


async def crashed(service: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """An upload all of whose bytes are staged, as a process leaves it that is killed while it finishes it."""
    name = await started(service, len(DATA), DIGEST)

    async def crash(*_: object, **__: object) -> None:
        raise ConnectionAbortedError("as if it were killed")

    with monkeypatch.context() as patched:
        patched.setattr(LocalStaging, "commit", crash)
        with pytest.raises(LuthierError):
            await write(service, chunk(name, 0, DATA, finish=True))
    await service.stop()
    return name


async def listed(service: Any) -> list[Upload]:
    answer = await service.call("ListUploads", data_service_pb2.ListUploadsRequest(parent=PROJECT))
    return list(answer.uploads)


async def until(what: Callable[[], Awaitable[Any]]) -> None:
    for _ in range(600):
        if await what():
            return
        await asyncio.sleep(0.05)
    pytest.fail("it never came")


async def test_a_service_serves_while_it_hashes_an_upload_that_was_being_finished(
    service: Any, monkeypatch: pytest.MonkeyPatch, reads: Reads
) -> None:
    name = await crashed(service, monkeypatch)
    await service.start()
    await asyncio.to_thread(reads.began.wait, 30)
    (upload,) = await listed(service)
    assert (upload.name, upload.state) == (name, Upload.STATE_RECEIVING)
    assert upload.persisted_size_bytes == len(DATA)
    reads.go.set()
    done = await service.call("GetUpload", data_service_pb2.GetUploadRequest(name=name))
    assert done.state == Upload.STATE_COMPLETE
    assert await service.blobs.read_bytes(DIGEST) == DATA


async def is_complete(service: Any) -> bool:
    return (await listed(service))[0].state == Upload.STATE_COMPLETE


async def is_empty(service: Any) -> bool:
    return (await listed(service))[0].persisted_size_bytes == 0


async def test_nobody_needs_to_ask_for_an_upload_that_was_being_finished(
    service: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    await crashed(service, monkeypatch)
    await service.start()
    await until(lambda: is_complete(service))


async def test_an_upload_that_goes_on_after_a_start_is_read_at_its_end_alone(
    service: Any, reads: Reads
) -> None:
    name = await started(service, len(DATA), DIGEST)
    await write(service, chunk(name, 0, DATA[:500_000]))
    await service.stop()
    await service.start()
    assert await persisted(service, name) == 500_000
    await write(service, chunk(name, 500_000, DATA[500_000:]))
    assert reads.count == 0
    reads.go.set()
    done = await write(service, chunk(name, len(DATA), b"", finish=True))
    assert done.state == Upload.STATE_COMPLETE
    assert reads.count > 0
    assert await service.blobs.read_bytes(DIGEST) == DATA


@pytest.mark.parametrize("torn", [b"", b"\0" * 1000], ids=["short", "zeros"])
async def test_a_torn_end_is_found_when_the_whole_is_hashed_and_the_upload_begins_again(
    service: Any, monkeypatch: pytest.MonkeyPatch, torn: bytes
) -> None:
    name = await crashed(service, monkeypatch)
    (staged,) = staged_files(service.home)
    staged.write_bytes(DATA[:-1000] + torn)
    await service.start()
    await until(lambda: is_empty(service))
    (upload,) = await listed(service)
    assert upload.state == Upload.STATE_RECEIVING
    assert not await service.blobs.has(DIGEST)
    await write(service, chunk(name, 0, DATA, finish=True))
    assert await service.blobs.read_bytes(DIGEST) == DATA


def staged_files(home: Path) -> list[Path]:
    return [path for path in (home / "data" / "blobs" / "staging").iterdir() if not path.suffix]
