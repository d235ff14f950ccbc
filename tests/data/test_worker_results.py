"""What a worker hands in to the Data service: a bad result changes nothing, and the task goes on to its end."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest
from tests.data.conftest import PROJECT, Service

from luthier.errors import InvalidArgument
from luthier.v1 import data_service_pb2, dataset_pb2
from luthier.v1.dataset_pb2 import DatasetVersion
from luthier.work.peers import bearer, error_of
from luthier.worker.v1 import task_pb2, worker_service_pb2, worker_service_pb2_grpc

W = worker_service_pb2
DIGEST = "0123456789abcdef" * 4


class ByHand:
    """A worker that says what it is told to say."""

    def __init__(self, stub: Any, metadata: Any) -> None:
        self._stub = stub
        self._metadata = metadata
        self.task = task_pb2.Task()

    async def call(self, method: str, **fields: Any) -> Any:
        request = getattr(W, f"{method}Request")(**fields)
        try:
            return await getattr(self._stub, method)(request, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            raise error_of(error) from error

    async def claim(self) -> None:
        kinds = [task_pb2.TASK_KIND_BUILD_VERSION]
        await self.call("RegisterWorker", worker="hand", kinds=kinds, instance="1")
        self.task = (await self.call("ClaimTask", worker="hand", wait_seconds=10)).task

    async def finish(self, result: task_pb2.TaskResult, **fields: Any) -> None:
        await self.call("FinishTask", task=self.task.task, epoch=self.task.epoch, result=result, **fields)


@asynccontextmanager
async def by_hand(service: Service) -> AsyncIterator[ByHand]:
    async with grpc.aio.insecure_channel(service.address) as channel:
        stub = worker_service_pb2_grpc.WorkerServiceStub(channel)
        yield ByHand(stub, bearer(service.keys.worker_key))


async def queued(service: Service) -> str:
    await service.call("CreateDataset", data_service_pb2.CreateDatasetRequest(parent=PROJECT, dataset_id="d"))
    upload = await service.uploaded(b'{"prompt": "a", "completion": "b"}\n')
    version = DatasetVersion(sources=[dataset_pb2.DatasetSource(upload=upload)])
    request = data_service_pb2.CreateDatasetVersionRequest(
        parent=f"{PROJECT}/datasets/d", dataset_version=version
    )
    return str((await service.call("CreateDatasetVersion", request)).name)


async def get(service: Service, name: str) -> DatasetVersion:
    request = data_service_pb2.GetDatasetVersionRequest(name=name)
    version: DatasetVersion = await service.call("GetDatasetVersion", request)
    return version


async def num_errors(service: Service, name: str) -> int:
    request = data_service_pb2.ListDatasetVersionErrorsRequest(parent=name)
    return len((await service.call("ListDatasetVersionErrors", request)).errors)


def shard(sha256: str, first_row: int = 0) -> task_pb2.Shard:
    return task_pb2.Shard(file=task_pb2.BlobFile(path="r", sha256=sha256), first_row=first_row, num_rows=1)


def rendered(sha256: str, digest: str) -> task_pb2.TaskResult:
    tokenizer = task_pb2.BlobFile(path="t", sha256=sha256)
    return task_pb2.TaskResult(render=task_pb2.RenderResult(tokenizer=tokenizer, digest=digest))


def built(sha256: str, **changes: Any) -> task_pb2.TaskResult:
    fields: dict[str, Any] = {
        "shards": [shard(sha256)],
        "statistics": dataset_pb2.DatasetStatistics(
            splits=[dataset_pb2.SplitStatistics(split=dataset_pb2.SPLIT_TRAIN, num_records=1)], num_records=1
        ),
        "digest": DIGEST,
        "formats": [dataset_pb2.DATASET_FORMAT_PROMPT_COMPLETION],
        "errors": [dataset_pb2.RecordError(filename="a", line=1, reason="R", message="m")],
    }
    return task_pb2.TaskResult(build_version=task_pb2.BuildVersionResult(**{**fields, **changes}))


BAD: dict[str, tuple[Callable[[str], task_pb2.TaskResult], str]] = {
    "no digest": (
        lambda sha256: built(sha256, digest=""),
        "result.build_version.digest: must be 64 lowercase hex digits, got nothing",
    ),
    "an error without a file": (
        lambda sha256: built(sha256, errors=[dataset_pb2.RecordError(reason="R")]),
        r"result.build_version.errors\[0\].filename: must be set, got nothing",
    ),
    "a format that nobody knows": (
        lambda sha256: built(sha256, formats=[77]),
        r"result.build_version.formats\[0\]: must be one of OPENAI_CHAT, .*, got number 77",
    ),
    "a format too many": (
        lambda sha256: built(sha256, formats=[1, 1]),
        "formats: must name 1 formats, one for each source, got 2",
    ),
    "rows that begin in the middle": (
        lambda sha256: built(sha256, shards=[shard(sha256, first_row=1)]),
        r"shards\[0\]: must hold at least one row from row 0 on",
    ),
    "a bad result of another task": (
        lambda sha256: rendered(sha256, ""),
        "result.render.digest: must be 64 lowercase hex digits, got nothing",
    ),
    "a good result of another task": (
        lambda sha256: rendered(sha256, DIGEST),
        "result: must be build_version, as its task is, got render",
    ),
    "the result of another service": (
        lambda _: task_pb2.TaskResult(train=task_pb2.TrainResult(step=1)),
        "result: must be one of build_version, render, got train",
    ),
    "nothing": (lambda _: task_pb2.TaskResult(), "result: must be one of build_version, render, got nothing"),
}


async def test_a_bad_result_is_refused_by_name_and_changes_nothing(service: Service) -> None:
    name = await queued(service)
    blob = await service.blobs.put_bytes(b"rows")
    async with by_hand(service) as worker:
        await worker.claim()
        for case, (make, said) in BAD.items():
            with pytest.raises(InvalidArgument, match=said):
                await worker.finish(make(blob.digest))
            version = await get(service, name)
            assert version.state == DatasetVersion.STATE_BUILDING, case
            assert not version.digest, case
            assert await num_errors(service, name) == 0, case
        await worker.finish(built(blob.digest))
    ready = await get(service, name)
    assert (ready.state, ready.digest) == (DatasetVersion.STATE_READY, DIGEST)
    assert await num_errors(service, name) == 1


async def test_what_is_known_of_a_version_that_failed_may_be_a_part(service: Service) -> None:
    name = await queued(service)
    async with by_hand(service) as worker:
        await worker.claim()
        error = {"code": 3, "message": "bad"}
        part = built("", shards=[], digest="", errors=[dataset_pb2.RecordError(filename="a", reason="")])
        with pytest.raises(InvalidArgument, match=r"errors\[0\].reason: must be set, got nothing"):
            await worker.finish(part, error=error)
        assert (await get(service, name)).state == DatasetVersion.STATE_BUILDING
        part.build_version.errors[0].reason = "R"
        await worker.finish(part, error=error)
    failed = await get(service, name)
    assert (failed.state, failed.error.message) == (DatasetVersion.STATE_FAILED, "bad")
    assert failed.statistics.num_records == 1
    assert await num_errors(service, name) == 1
