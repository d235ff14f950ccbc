"""What a worker says that it has, on the wire, and what it is given for it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.work.conftest import new_task
from tests.work.hosted import Site, serve
from tests.work.test_servicer import refusal

from luthier.v1 import device_pb2
from luthier.work import waiting
from luthier.work.requirements import GIB, Equipment, Requirements
from luthier.worker.v1 import task_pb2, worker_service_pb2

W = worker_service_pb2


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with serve(tmp_path / "home") as served:
        yield served


async def test_a_worker_is_given_what_its_equipment_meets(site: Site) -> None:
    new = new_task("jobs/gpu", required=Requirements(device="CUDA", memory_bytes=GIB))
    async with site.parts.database.transaction() as connection:
        await site.parts.queue.enqueue(connection, new)
    async with site.wire() as (stub, metadata):
        for worker, equipment in (
            ("old", None),
            ("cpu", W.Equipment(device=device_pb2.DEVICE_KIND_CPU, memory_bytes=8 * GIB)),
            ("small", W.Equipment(device=device_pb2.DEVICE_KIND_CUDA, memory_bytes=GIB - 1)),
            ("gpu", W.Equipment(device=device_pb2.DEVICE_KIND_CUDA, memory_bytes=GIB)),
        ):
            kinds = [task_pb2.TASK_KIND_TRAIN]
            register = W.RegisterWorkerRequest(worker=worker, kinds=kinds, equipment=equipment)
            await stub.RegisterWorker(register, metadata=metadata)
            response = await stub.ClaimTask(W.ClaimTaskRequest(worker=worker), metadata=metadata)
            assert response.task.subject == ("jobs/gpu" if worker == "gpu" else "")


@pytest.mark.parametrize(
    ("equipment", "said"),
    [
        (
            W.Equipment(device=device_pb2.DEVICE_KIND_GPU),
            "equipment.device must be the kind that the worker has",
        ),
        (W.Equipment(memory_bytes=-1), "equipment.memory_bytes"),
        (
            W.Equipment(device_name="x" * 201),
            "equipment.device_name must have at most 200 characters, got 201",
        ),
        (W.Equipment(device=99), "equipment.device"),  # type: ignore[arg-type]
    ],
)
async def test_equipment_that_cannot_be_is_refused(site: Site, equipment: W.Equipment, said: str) -> None:
    async with site.wire() as (stub, metadata):
        register = W.RegisterWorkerRequest(worker="w", kinds=[task_pb2.TASK_KIND_TRAIN], equipment=equipment)
        error = await refusal(stub.RegisterWorker(register, metadata=metadata))
    assert error.code == "INVALID_ARGUMENT"
    assert said in error.message


async def test_a_worker_says_what_it_has(site: Site) -> None:
    has = Equipment(device="CUDA", device_name="a GPU", num_devices=1, memory_bytes=GIB, num_cores=3)
    async with site.worker(lambda context: task_pb2.TaskResult(), equipment=has):
        await site.until(lambda: bool(site.parts.workers.present()))
        assert [one.equipment for one in site.parts.workers.present()] == [has]


async def test_a_service_looks_for_tasks_that_nobody_can_do_by_itself(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "PATIENCE_SECONDS", 0.0)
    await site.enqueue()
    await site.until(lambda: "luthierd worker training" in site.handler.waiting.get("jobs/a", ""))
    async with site.wire() as (stub, metadata):
        register = W.RegisterWorkerRequest(worker="w", kinds=[task_pb2.TASK_KIND_TRAIN])
        await stub.RegisterWorker(register, metadata=metadata)
        await site.until(lambda: site.handler.waiting["jobs/a"] == "")
    assert len(await site.texts()) == 1
