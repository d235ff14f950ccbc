"""The worker protocol on the wire: who may call, what a stale epoch gets, what is refused."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from tests.work.hosted import Site, serve

from luthier.work.peers import error_of
from luthier.worker.v1 import task_pb2, worker_service_pb2

W = worker_service_pb2
STALE: dict[str, Callable[[], Any]] = {
    "Heartbeat": lambda: W.HeartbeatRequest(task="t", epoch=3),
    "ReportEvents": lambda: W.ReportEventsRequest(task="t", epoch=3),
    "GrantBlob": lambda: W.GrantBlobRequest(task="t", epoch=3),
    "PutBlob": lambda: iter([W.PutBlobRequest(task="t", epoch=3, sha256="0" * 64)]),
    "CommitCheckpoint": lambda: W.CommitCheckpointRequest(task="t", epoch=3),
    "FinishTask": lambda: W.FinishTaskRequest(task="t", epoch=3, cancelled=True),
}


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with serve(tmp_path / "home") as served:
        yield served


async def refusal(call: Any) -> Any:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return error_of(caught.value)


async def claimed(stub: Any, metadata: Any, site: Site) -> Any:
    await site.enqueue()
    register = W.RegisterWorkerRequest(worker="w", kinds=[task_pb2.TASK_KIND_TRAIN], instance="1")
    await stub.RegisterWorker(register, metadata=metadata)
    response = await stub.ClaimTask(W.ClaimTaskRequest(worker="w", wait_seconds=5), metadata=metadata)
    assert response.HasField("task")
    return response.task


@pytest.mark.parametrize("method", sorted(STALE))
async def test_a_stale_epoch_is_refused(site: Site, method: str) -> None:
    async with site.wire() as (stub, metadata):
        error = await refusal(getattr(stub, method)(STALE[method](), metadata=metadata))
    assert (error.code, error.reason) == ("FAILED_PRECONDITION", "LEASE_LOST")
    assert "not leased at epoch 3" in error.message


async def test_a_stale_epoch_may_not_read_either(site: Site) -> None:
    async with site.wire() as (stub, metadata):
        stream = stub.GetBlob(W.GetBlobRequest(task="t", epoch=3, sha256="0" * 64), metadata=metadata)
        error = await refusal(stream.read())
    assert error.reason == "LEASE_LOST"


async def test_only_a_worker_key_may_call(site: Site) -> None:
    token = site.parts.task_tokens.mint("p", ("projects/p",), 1, "t", 60)
    for secret in (site.keys.api_key, token):
        async with site.wire(secret) as (stub, metadata):
            error = await refusal(stub.Heartbeat(W.HeartbeatRequest(), metadata=metadata))
            assert error.code == "PERMISSION_DENIED"


async def test_a_worker_that_did_not_register_gets_no_task(site: Site) -> None:
    async with site.wire() as (stub, metadata):
        error = await refusal(stub.ClaimTask(W.ClaimTaskRequest(worker="w"), metadata=metadata))
    assert (error.code, error.reason) == ("FAILED_PRECONDITION", "WRONG_STATE")
    assert "'w' is not registered" in error.message


async def test_a_worker_id_that_does_not_fit_is_refused(site: Site) -> None:
    async with site.wire() as (stub, metadata):
        error = await refusal(stub.RegisterWorker(W.RegisterWorkerRequest(worker="A b"), metadata=metadata))
    assert "got 'A b'" in error.message


async def test_bytes_with_another_digest_leave_nothing(site: Site) -> None:
    async with site.wire() as (stub, metadata):
        task = await claimed(stub, metadata, site)
        wrong = hashlib.sha256(b"other").hexdigest()
        chunk = W.PutBlobRequest(task=task.task, epoch=task.epoch, sha256=wrong, data=b"bytes")
        error = await refusal(stub.PutBlob(iter([chunk]), metadata=metadata))
        assert error.reason == "CHECKSUM_MISMATCH"
        granted = await stub.GrantBlob(
            W.GrantBlobRequest(task=task.task, epoch=task.epoch, sha256=[wrong]), metadata=metadata
        )
    assert list(granted.missing_sha256) == [wrong]


@pytest.mark.parametrize("method", ["CommitCheckpoint", "FinishTask"])
async def test_a_result_that_names_a_missing_blob_is_refused(site: Site, method: str) -> None:
    file = task_pb2.BlobFile(path="a", sha256="a" * 64)
    async with site.wire() as (stub, metadata):
        task = await claimed(stub, metadata, site)
        where = {"task": task.task, "epoch": task.epoch}
        request = (
            W.CommitCheckpointRequest(**where, step=1, files=[file])
            if method == "CommitCheckpoint"
            else W.FinishTaskRequest(
                **where, result=task_pb2.TaskResult(train=task_pb2.TrainResult(files=[file]))
            )
        )
        error = await refusal(getattr(stub, method)(request, metadata=metadata))
    assert error.code == "NOT_FOUND"
    assert "a" * 64 in error.message
    assert site.states == ["started"]


@pytest.mark.parametrize("method", ["CommitCheckpoint", "FinishTask"])
async def test_a_result_whose_file_lies_elsewhere_is_refused(site: Site, method: str) -> None:
    file = task_pb2.BlobFile(path="../../x", sha256="a" * 64)
    result = task_pb2.TaskResult(train=task_pb2.TrainResult(files=[file]))
    async with site.wire() as (stub, metadata):
        task = await claimed(stub, metadata, site)
        where = {"task": task.task, "epoch": task.epoch}
        request = (
            W.CommitCheckpointRequest(**where, step=1, files=[file])
            if method == "CommitCheckpoint"
            else W.FinishTaskRequest(**where, result=result)
        )
        error = await refusal(getattr(stub, method)(request, metadata=metadata))
    assert (error.code, error.reason) == ("INVALID_ARGUMENT", "PATH_NOT_ALLOWED")
    assert "got '../../x'" in error.message
    assert site.states == ["started"]


async def test_a_worker_may_not_write_the_services_events(site: Site) -> None:
    async with site.wire() as (stub, metadata):
        task = await claimed(stub, metadata, site)
        local = W.LocalEvent(local_number=1)
        local.event.state_change.state = "SUCCEEDED"
        request = W.ReportEventsRequest(task=task.task, epoch=task.epoch, events=[local])
        error = await refusal(stub.ReportEvents(request, metadata=metadata))
    assert error.code == "INVALID_ARGUMENT"
    assert "got state_change" in error.message


async def test_this_service_orders_no_generations(site: Site) -> None:
    async with site.wire() as (stub, metadata):
        await claimed(stub, metadata, site)
        stream = stub.TakeGenerations(W.TakeGenerationsRequest(worker="w", slots=1), metadata=metadata)
        error = await refusal(stream.read())
    assert "ask the Evaluation service" in error.message
