"""The worker protocol on the wire: who may call, what a stale epoch gets, what is refused."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import status_pb2
from tests.work.hosted import Site, serve

from luthier.v1 import event_pb2, model_pb2
from luthier.work.peers import error_of
from luthier.worker.v1 import task_pb2, worker_service_pb2

W = worker_service_pb2
STALE: dict[str, Callable[[], Any]] = {
    "Heartbeat": lambda: W.HeartbeatRequest(task="t", epoch=3),
    "ReportEvents": lambda: W.ReportEventsRequest(task="t", epoch=3),
    "GrantBlob": lambda: W.GrantBlobRequest(task="t", epoch=3),
    "PutBlob": lambda: iter([W.PutBlobRequest(task="t", epoch=3, sha256="0" * 64)]),
    "CommitCheckpoint": lambda: W.CommitCheckpointRequest(task="t", epoch=3),
    "CommitRollouts": lambda: W.CommitRolloutsRequest(
        task="t", epoch=3, step=1, num_rollouts=1, file=task_pb2.BlobFile(path="a", sha256="0" * 64)
    ),
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


@pytest.mark.parametrize("sizes", [[(1 << 20) + 1], [1 << 20, (1 << 20) + 1]])
async def test_a_piece_of_a_blob_that_is_too_large_leaves_nothing(site: Site, sizes: list[int]) -> None:
    pieces = [b"x" * size for size in sizes]
    digest = hashlib.sha256(b"".join(pieces)).hexdigest()
    async with site.wire() as (stub, metadata):
        task = await claimed(stub, metadata, site)
        head = {"task": task.task, "epoch": task.epoch}
        requests = [W.PutBlobRequest(**head, sha256=digest, data=piece) for piece in pieces]
        error = await refusal(stub.PutBlob(iter(requests), metadata=metadata))
        granted = await stub.GrantBlob(W.GrantBlobRequest(**head, sha256=[digest]), metadata=metadata)
    assert (error.code, error.reason) == ("INVALID_ARGUMENT", "INVALID_FIELD")
    assert error.message == f"data must have at most 1048576 bytes, got {sizes[-1]}"
    assert list(granted.missing_sha256) == [digest]


@pytest.mark.parametrize("method", ["CommitCheckpoint", "CommitRollouts", "FinishTask"])
async def test_a_result_that_names_a_missing_blob_is_refused(site: Site, method: str) -> None:
    file = task_pb2.BlobFile(path="a", sha256="a" * 64)
    async with site.wire() as (stub, metadata):
        task = await claimed(stub, metadata, site)
        where = {"task": task.task, "epoch": task.epoch}
        result = task_pb2.TaskResult(train=task_pb2.TrainResult(files=[file]))
        request = {
            "CommitCheckpoint": W.CommitCheckpointRequest(**where, step=1, files=[file]),
            "CommitRollouts": W.CommitRolloutsRequest(**where, step=1, file=file, num_rollouts=1),
            "FinishTask": W.FinishTaskRequest(**where, result=result),
        }[method]
        error = await refusal(getattr(stub, method)(request, metadata=metadata))
    assert (error.code, error.reason) == ("FAILED_PRECONDITION", "BLOB_MISSING")
    assert error.message == f"blob {'a' * 64} must be here before it is named; send it with PutBlob first"
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


NAN, INFINITE = float("nan"), float("inf")


async def result_of(task: Any, **fields: Any) -> Any:
    return W.FinishTaskRequest(task=task.task, epoch=task.epoch, **fields)


@pytest.mark.parametrize("wait_seconds", [NAN, INFINITE, -INFINITE, -1.0])
async def test_a_wait_that_is_no_time_is_refused_and_the_service_lives_on(
    site: Site, wait_seconds: float
) -> None:
    async with site.wire() as (stub, metadata):
        task = await claimed(stub, metadata, site)
        error = await refusal(
            stub.ClaimTask(W.ClaimTaskRequest(worker="w", wait_seconds=wait_seconds), metadata=metadata)
        )
        assert (error.code, error.reason) == ("INVALID_ARGUMENT", "INVALID_FIELD")
        assert "wait_seconds" in error.message
        await stub.Heartbeat(W.HeartbeatRequest(task=task.task, epoch=task.epoch), metadata=metadata)
    await asyncio.wait_for(asyncio.sleep(0.01), 1)  # asyncio's timers go on


def _event(**fields: Any) -> event_pb2.Event:
    return event_pb2.Event(**fields)


BAD_REPORTS: dict[str, tuple[event_pb2.Event, str]] = {
    "a metric that is NaN": (
        _event(metrics=event_pb2.MetricValues(values={"loss": NAN})),
        "events[0].event.metrics.values['loss']: must be a finite number, got nan",
    ),
    "time left that is infinite": (
        _event(progress=event_pb2.Progress(remaining_seconds=INFINITE)),
        "events[0].event.progress.remaining_seconds: must be a finite number, got inf",
    ),
    "progress that is negative": (
        _event(progress=event_pb2.Progress(completed=-1)),
        "events[0].event.progress.completed: must not be negative, got -1",
    ),
    "a step that is negative": (
        _event(step=-5, log=event_pb2.LogLine(text="x")),
        "events[0].event.step: must not be negative, got -5",
    ),
    "a severity that nobody knows": (
        _event(log=event_pb2.LogLine(severity=77, text="x")),  # type: ignore[arg-type]
        "events[0].event.log.severity: must be one of INFO, WARNING, ERROR, got number 77",
    ),
}


@pytest.mark.parametrize("case", sorted(BAD_REPORTS))
async def test_a_report_with_an_odd_value_is_refused_by_name(site: Site, case: str) -> None:
    bad, said = BAD_REPORTS[case]
    async with site.wire() as (stub, metadata):
        task = await claimed(stub, metadata, site)
        request = W.ReportEventsRequest(
            task=task.task, epoch=task.epoch, events=[W.LocalEvent(local_number=1, event=bad)]
        )
        error = await refusal(stub.ReportEvents(request, metadata=metadata))
    assert error.code == "INVALID_ARGUMENT"
    assert said in error.message
    assert site.states == ["started"]


@pytest.mark.parametrize("number", [0, 99, -1])
async def test_a_kind_that_nobody_knows_is_refused(site: Site, number: int) -> None:
    async with site.wire() as (stub, metadata):
        register = W.RegisterWorkerRequest(worker="w", kinds=[number])  # type: ignore[list-item]
        error = await refusal(stub.RegisterWorker(register, metadata=metadata))
    assert error.code == "INVALID_ARGUMENT"
    assert "kinds" in error.message


async def test_a_claim_for_a_kind_that_was_not_registered_is_refused(site: Site) -> None:
    async with site.wire() as (stub, metadata):
        await claimed(stub, metadata, site)
        request = W.ClaimTaskRequest(worker="w", kinds=[task_pb2.TASK_KIND_RENDER])
        error = await refusal(stub.ClaimTask(request, metadata=metadata))
    assert error.code == "INVALID_ARGUMENT"
    assert "got RENDER" in error.message


@pytest.mark.parametrize("code", [0, 17, 4711, -3])
async def test_an_outcome_with_a_code_that_is_no_error_is_refused(site: Site, code: int) -> None:
    async with site.wire() as (stub, metadata):
        task = await claimed(stub, metadata, site)
        failed = await result_of(task, error=status_pb2.Status(code=code, message="m"))
        error = await refusal(stub.FinishTask(failed, metadata=metadata))
        assert error.code == "INVALID_ARGUMENT"
        assert f"error.code: must be a gRPC status code from 1 to 16, got {code}" in error.message
        garbled = status_pb2.Status(code=3, message="m")
        garbled.details.add(type_url="type.googleapis.com/google.rpc.ErrorInfo", value=b"\xff\xff")
        await stub.FinishTask(await result_of(task, error=garbled), metadata=metadata)
    # What cannot be read is as if it had not been sent: the reason is the default of the code.
    assert (site.handler.failures[0].code, site.handler.failures[0].reason) == (
        "INVALID_ARGUMENT",
        "INVALID_FIELD",
    )


async def test_a_piece_of_text_with_an_unknown_reason_is_refused(site: Site) -> None:
    async with site.wire() as (stub, metadata):
        piece = W.PushGenerationRequest(generation="g", finish_reason=55)  # type: ignore[arg-type]
        error = await refusal(stub.PushGeneration(piece, metadata=metadata))
    assert error.code == "INVALID_ARGUMENT"
    assert "finish_reason: must be one of" in error.message


@pytest.mark.parametrize("path", ["../../x", "/etc/passwd", "a/../../b", "", "a\\b", "a//b"])
@pytest.mark.parametrize("method", ["FinishTask", "CommitCheckpoint"])
async def test_a_path_that_leaves_its_folder_is_refused(site: Site, method: str, path: str) -> None:
    blob = await site.blobs.put_bytes(b"weights")
    file = task_pb2.BlobFile(path=path, sha256=blob.digest)
    async with site.wire() as (stub, metadata):
        task = await claimed(stub, metadata, site)
        request = (
            W.CommitCheckpointRequest(task=task.task, epoch=task.epoch, step=1, files=[file])
            if method == "CommitCheckpoint"
            else await result_of(
                task,
                result=task_pb2.TaskResult(
                    register_model=task_pb2.RegisterModelResult(
                        files=[model_pb2.ModelFile(path=path, sha256=blob.digest)]
                    )
                ),
            )
        )
        error = await refusal(getattr(stub, method)(request, metadata=metadata))
    assert (error.code, error.reason) == ("INVALID_ARGUMENT", "PATH_NOT_ALLOWED")
    assert repr(path) in error.message
    assert site.states == ["started"]


async def test_a_claim_whose_answer_was_lost_is_repeated_without_a_second_lease(site: Site) -> None:
    async with site.wire() as (stub, metadata):
        await site.enqueue("jobs/a")
        await site.enqueue("jobs/b")
        register = W.RegisterWorkerRequest(worker="w", kinds=[task_pb2.TASK_KIND_TRAIN], instance="1")
        await stub.RegisterWorker(register, metadata=metadata)
        request = W.ClaimTaskRequest(worker="w", claim="c1", instance="1")
        first = await stub.ClaimTask(request, metadata=metadata)  # dropped
        again = await stub.ClaimTask(request, metadata=metadata)
    assert (first.task.task, first.task.epoch) == (again.task.task, again.task.epoch)
    assert site.handler.calls == [("started", 1)]


async def test_a_second_process_of_an_id_is_refused_and_told_when_to_ask_again(site: Site) -> None:
    async with site.wire() as (stub, metadata):
        await claimed(stub, metadata, site)
        second = W.RegisterWorkerRequest(worker="w", kinds=[task_pb2.TASK_KIND_TRAIN], instance="2")
        error = await refusal(stub.RegisterWorker(second, metadata=metadata))
        assert (error.code, error.reason) == ("ALREADY_EXISTS", "WORKER_ID_TAKEN")
        assert 0 < error.retry_after_seconds <= 30
        assert site.states == ["started"], "the first keeps its task"
        foreign = W.ClaimTaskRequest(worker="w", instance="2")
        error = await refusal(stub.ClaimTask(foreign, metadata=metadata))
        assert (error.code, error.reason) == ("FAILED_PRECONDITION", "WRONG_STATE")


async def test_a_live_lease_keeps_its_worker_id_through_a_restart_of_the_service(tmp_path: Path) -> None:
    async with serve(tmp_path / "home") as first, first.wire() as (stub, metadata):
        await claimed(stub, metadata, first)
    async with serve(tmp_path / "home") as second, second.wire() as (stub, metadata):
        intruder = W.RegisterWorkerRequest(worker="w", kinds=[task_pb2.TASK_KIND_TRAIN], instance="2")
        error = await refusal(stub.RegisterWorker(intruder, metadata=metadata))
        assert error.reason == "WORKER_ID_TAKEN"
        await stub.RegisterWorker(
            W.RegisterWorkerRequest(worker="w", kinds=[task_pb2.TASK_KIND_TRAIN], instance="1"),
            metadata=metadata,
        )
        assert second.states == []


async def test_the_number_of_workers_falls_when_one_is_silent(tmp_path: Path) -> None:
    def shown() -> float | None:
        value: float | None = served.parts.metrics.registry.get_sample_value("luthier_workers")
        return value

    async with serve(tmp_path / "home", lease_seconds=0.5) as served, served.wire() as (stub, metadata):
        register = W.RegisterWorkerRequest(worker="w", kinds=[task_pb2.TASK_KIND_TRAIN], instance="1")
        await stub.RegisterWorker(register, metadata=metadata)
        assert shown() == 1
        await served.until(lambda: shown() == 0, 10)
