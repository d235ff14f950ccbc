"""A registration is stopped on request, whoever works at it, and what was stopped can be deleted."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from tests.training.worker.conftest import MODEL, PARENT, Site

from luthier.training.worker.register import register_in
from luthier.v1.model_pb2 import Model
from luthier.v1.model_service_pb2 import (
    CancelModelRequest,
    DeleteModelRequest,
    RegisterBaseModelRequest,
    WatchModelRequest,
)
from luthier.work.children import Children, Program

# A source that never comes: the child says that it is there, and waits.
CHILD = """
import os, time
from luthier.work.child import serve

def work(line, order):
    (order.scratch.parent.parent / "pid").write_text(str(os.getpid()))
    while True:
        time.sleep(0.05)

serve(lambda setup: work)
"""


async def registered(site: Site, folder: Path) -> Model:
    request = RegisterBaseModelRequest(parent=PARENT, model_id="tiny", model=Model(directory=str(folder)))
    made: Model = await site.models.RegisterBaseModel(request, metadata=site.metadata)
    return made


async def cancelled(site: Site) -> Model:
    asked: Model = await site.models.CancelModel(CancelModelRequest(name=MODEL), metadata=site.metadata)
    return asked


async def states(site: Site) -> list[str]:
    events = site.models.WatchModel(WatchModelRequest(name=MODEL), metadata=site.metadata)
    return [event.state_change.state async for event in events if event.HasField("state_change")]


async def test_a_model_that_waits_for_a_worker_is_cancelled_at_once_deleted_and_registered_again(
    site: Site, model_folder: Path
) -> None:
    made = await registered(site, model_folder)
    assert (await cancelled(site)).state == Model.STATE_CANCELLED
    assert await states(site) == ["QUEUED", "CANCELLED"]
    assert (await cancelled(site)).state == Model.STATE_CANCELLED, "what has ended is returned unchanged"
    await site.models.DeleteModel(DeleteModelRequest(name=MODEL), metadata=site.metadata)
    async with site.worker():
        again = await site.register(model_folder)
    assert again.state == Model.STATE_READY, again.error
    assert again.uid != made.uid


async def test_a_model_that_a_worker_reads_is_stopped_with_the_process_that_reads_it(
    site: Site, model_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "child.py").write_text(CHILD)
    program = Program(command=("-P", str(tmp_path / "child.py")))
    children = Children(program)
    async with site.worker(register=register_in(children)):
        await registered(site, model_folder)
        pid = await pid_below(site.home)
        asked = await cancelled(site)
        assert asked.state == Model.STATE_CANCELLING
        assert (await cancelled(site)).etag == asked.etag, "asking twice changes nothing"
        async with asyncio.timeout(60):
            found = await states(site)
    children.close()
    assert found == ["QUEUED", "REGISTERING", "CANCELLING", "CANCELLED"]
    assert not runs(pid), "the process that read the source is gone"
    gone: Any = await site.models.DeleteModel(DeleteModelRequest(name=MODEL), metadata=site.metadata)
    assert not gone.HasField("error"), "it was stopped, it did not fail"


async def pid_below(folder: Path) -> str:
    """Wait until the child has said that it is there."""
    async with asyncio.timeout(60):
        while not (pid := said_below(folder)):  # noqa: ASYNC110 - another process brings it about
            await asyncio.sleep(0.05)
    return pid


def runs(pid: str) -> bool:
    return Path(f"/proc/{pid}").exists()


def said_below(folder: Path) -> str:
    return "".join(said.read_text() for said in folder.rglob("pid"))
