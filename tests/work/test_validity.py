"""What a worker sends is looked at, however deep, before anything uses it."""

from __future__ import annotations

import pytest
from google.protobuf.message import Message

from luthier.errors import InvalidArgument
from luthier.v1 import dataset_pb2, model_pb2
from luthier.work.validity import require_valid
from luthier.worker.v1 import task_pb2, worker_service_pb2

OUTSIDE = [
    "../x",
    "../../x",
    "a/../../x",
    "/etc/passwd",
    "..",
    ".",
    "./x",
    "a//b",
    "a/",
    "a\\..\\b",
    "a\x00b",
    "a\nb",
    "a" * 513,
    "ü" * 257,
]


@pytest.mark.parametrize(
    "path", ["adapter_model.safetensors", "a/b.json", "..x", ".hidden", "x..y/z", "a" * 512]
)
def test_a_file_below_its_folder_may_be_named(path: str) -> None:
    require_valid(task_pb2.BlobFile(path=path, sha256="0" * 64))


@pytest.mark.parametrize("path", OUTSIDE)
def test_every_file_of_a_result_is_checked(path: str) -> None:
    file = task_pb2.BlobFile(path=path, sha256="0" * 64)
    model_file = model_pb2.ModelFile(path=path, sha256="0" * 64)
    results = [
        task_pb2.TaskResult(train=task_pb2.TrainResult(files=[file])),
        task_pb2.TaskResult(register_model=task_pb2.RegisterModelResult(files=[model_file])),
        task_pb2.TaskResult(evaluate=task_pb2.EvaluateResult(predictions=file)),
        task_pb2.TaskResult(answer_share=task_pb2.AnswerShareResult(predictions=file)),
        task_pb2.TaskResult(merge=task_pb2.MergeResult(files=[file])),
        task_pb2.TaskResult(export=task_pb2.ExportResult(files=[file])),
        task_pb2.TaskResult(render=task_pb2.RenderResult(shards=[task_pb2.Shard(file=file)])),
        task_pb2.TaskResult(render=task_pb2.RenderResult(tokenizer=file)),
        task_pb2.TaskResult(build_version=task_pb2.BuildVersionResult(shards=[task_pb2.Shard(file=file)])),
    ]
    assert {one.WhichOneof("result") for one in results} == {
        field.name for field in task_pb2.TaskResult.DESCRIPTOR.oneofs_by_name["result"].fields
    }
    requests = [worker_service_pb2.FinishTaskRequest(result=result) for result in results]
    for request in (
        *requests,
        worker_service_pb2.CommitCheckpointRequest(files=[file]),
        worker_service_pb2.CommitRolloutsRequest(file=file),
    ):
        with pytest.raises(InvalidArgument, match="path: must be a") as caught:
            require_valid(request)
        assert caught.value.reason == "PATH_NOT_ALLOWED"


def test_a_file_is_named_once_and_other_paths_are_none_of_ours() -> None:
    file = task_pb2.BlobFile(path="a", sha256="0" * 64)
    with pytest.raises(InvalidArgument, match="files: must name each file once, got 'a' twice"):
        require_valid(task_pb2.TrainResult(files=[file, file]))
    require_valid(task_pb2.TrainResult(files=[file, task_pb2.BlobFile(path="b", sha256="0" * 64)]))
    error = dataset_pb2.RecordError(path="messages[0]..content")
    require_valid(task_pb2.BuildVersionResult(errors=[error, error]))


@pytest.mark.parametrize(
    ("request_", "named"),
    [
        (
            worker_service_pb2.ClaimTaskRequest(wait_seconds=-1e-9),
            "wait_seconds: must not be negative, got -1e-09",
        ),
        (
            worker_service_pb2.CommitCheckpointRequest(seconds=-1.7e308),
            "seconds: must not be negative, got -1.7e+308",
        ),
        (
            worker_service_pb2.ReportEventsRequest(
                figures=worker_service_pb2.TaskFigures(
                    phase_seconds={"data": 1.0, "compute": -2.0}, device_use=-0.5
                )
            ),
            "figures.phase_seconds['compute']: must not be negative, got -2.0; "
            "figures.device_use: must be in 0..1, got -0.5",
        ),
        (
            worker_service_pb2.ReportEventsRequest(figures=worker_service_pb2.TaskFigures(device_use=1.01)),
            "figures.device_use: must be in 0..1, got 1.01",
        ),
    ],
)
def test_times_and_shares_are_in_range(request_: Message, named: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        require_valid(request_)
    assert caught.value.message == named


def test_a_metric_may_be_negative_and_a_device_all_in_use() -> None:
    require_valid(worker_service_pb2.CommitCheckpointRequest(metrics={"reward": -2.0}, seconds=0.0))
    require_valid(
        worker_service_pb2.ReportEventsRequest(figures=worker_service_pb2.TaskFigures(device_use=1.0))
    )
