"""Versions built and rendered in processes of their own, killed for real: the attempt is lost, never the worker."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from luthier.data.worker.__main__ import in_child, program_of
from luthier.v1 import data_service_pb2
from luthier.v1.dataset_pb2 import DatasetVersion
from luthier.v1.event_pb2 import AttemptChange
from luthier.v1.rendering_pb2 import Rendering
from luthier.work.child import NURSERY_NAME
from luthier.work.children import Children

MODULE = "luthier.data.worker.child"
CHATS = b"".join(
    json.dumps(
        {"messages": [{"role": "user", "content": f"q{one}"}, {"role": "assistant", "content": f"a{one}"}]}
    ).encode()
    + b"\n"
    for one in range(20)
)


@pytest.fixture
def children() -> Iterator[Children]:
    with Children(program_of("INFO")) as found:
        found.require_ready()
        yield found


def waiting() -> int:
    """The child of this process that waits for work."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "stat").read_text().rpartition(")")[2].split()
            if (path / "comm").read_text().strip() == NURSERY_NAME:
                continue  # it is forked from it
            if int(words[1]) == os.getpid() and MODULE.encode() in (path / "cmdline").read_bytes():
                return int(path.name)
        except OSError:
            continue
    pytest.fail("no child waits")


async def killed_at_work(children: Children, work: Callable[[], Any]) -> Any:
    """Do something whose child is killed: it is stopped before, so that it cannot be done by then."""
    await asyncio.to_thread(children.require_ready)
    child = waiting()
    os.kill(child, signal.SIGSTOP)
    at_work = asyncio.create_task(work())
    async with asyncio.timeout(30):
        while not children.num_running:  # noqa: ASYNC110 - a worker's thread brings it about
            await asyncio.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    return await at_work


async def changes(service: Any, method: str, request: Any) -> list[tuple[AttemptChange.Kind.ValueType, str]]:
    events = await service.stream(method, request)
    found = [event.attempt_change for event in events if event.HasField("attempt_change")]
    return [(change.kind, change.reason) for change in found if change.kind != AttemptChange.KIND_STARTED]


async def test_what_a_killed_child_was_at_is_done_again_with_the_same_digest(
    service: Any, children: Children
) -> None:
    async with service.worker():
        version = await service.version(CHATS, dataset="here")
        rendering = await service.rendering(version.name)
    async with service.worker(in_child(children), in_child(children)):
        again = await killed_at_work(children, lambda: service.version(CHATS, dataset="there"))
        rendered = await killed_at_work(children, lambda: service.rendering(again.name))
    assert again.state == DatasetVersion.STATE_READY, again.error
    assert rendered.state == Rendering.STATE_READY, rendered.error
    assert (again.digest, rendered.digest) == (version.digest, rendering.digest)
    watch = data_service_pb2.WatchDatasetVersionRequest(name=again.name)
    lost_once = [(AttemptChange.KIND_LOST, "CRASHED"), (AttemptChange.KIND_SUCCEEDED, "")]
    assert await changes(service, "WatchDatasetVersion", watch) == lost_once
    watched = data_service_pb2.WatchRenderingRequest(name=rendered.name)
    assert await changes(service, "WatchRendering", watched) == lost_once


async def test_what_is_wrong_with_records_is_named_by_another_process_too(
    service: Any, children: Children
) -> None:
    async with service.worker(in_child(children), in_child(children)):
        version = await service.version(CHATS + b"{\n")
        assert version.state == DatasetVersion.STATE_FAILED
        request = data_service_pb2.ListDatasetVersionErrorsRequest(parent=version.name)
        (error,) = (await service.call("ListDatasetVersionErrors", request)).errors
    assert (error.filename, error.line) == ("0.jsonl", 21)


def test_a_child_has_no_grpc() -> None:
    code = f"import sys; import {MODULE}; print('grpc' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
