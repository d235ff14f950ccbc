"""The table of bad input: what each mistake is answered with, over real processes."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.json_format import ParseDict
from tests.e2e.conftest import WAIT, Shared, job, make_tiny_model

from luthier import errors
from luthier.client import Client, ResourceFailed
from luthier.errors import LuthierError
from luthier.v1 import data_service_pb2, data_service_pb2_grpc
from luthier.v1.dataset_pb2 import DatasetSource
from luthier.v1.fine_tuning_job_pb2 import FineTuningJob, LoraConfig
from luthier.v1.model_pb2 import Model
from luthier.v1.rendering_pb2 import Rendering
from luthier.v1.upload_pb2 import Upload
from luthier.work.peers import bearer, error_of
from luthier.worker.v1 import worker_service_pb2, worker_service_pb2_grpc

pytestmark = pytest.mark.e2e
USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
BAD: dict[str, list[dict[str, Any]]] = json.loads(Path(__file__).with_name("bad_input.json").read_text())
"""Files and renderings with what each is answered with; the TypeScript client's tests have the same."""


def refused(call: Callable[[], Any]) -> LuthierError:
    with pytest.raises(LuthierError) as caught:
        call()
    return caught.value


def build(client: Client, path: Path) -> Any:
    upload = client.datasets.upload(path)
    version = client.datasets.create_version("things", [DatasetSource(upload=upload.name)])
    return client.datasets.versions.wait(version.name, timeout_seconds=WAIT)


@pytest.mark.parametrize("bad", BAD["files"], ids=lambda bad: bad["file"])
def test_a_bad_file_fails_its_version(tuning: Shared, tmp_path: Path, bad: dict[str, Any]) -> None:
    path = tmp_path / bad["file"]
    path.write_text(
        "".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in bad["lines"])
    )
    with tuning.cluster.client() as client:
        with pytest.raises(ResourceFailed, match=bad["said"]) as caught:
            build(client, path)
        assert caught.value.failure is not None
        assert (caught.value.failure.code, caught.value.reason) == ("INVALID_ARGUMENT", bad["reason"])
        failed = client.datasets.versions.get(caught.value.resource.name)
        assert failed.digest == ""
        told = list(client.datasets.versions.errors(failed.name, page_size=3))
    places = [(bad["file"], one["line"], one["path"], one["reason"]) for one in bad["records"]]
    assert [(one.filename, one.line, one.path, one.reason) for one in told] == places
    for one, right in zip(told, bad["records"], strict=True):
        assert re.search(right["said"], one.message), one.message


def test_a_record_that_teaches_nothing_is_named_before_a_job_starts(tuning: Shared, tmp_path: Path) -> None:
    path = tmp_path / "muted.jsonl"
    muted = {"messages": [USER, {**ASSISTANT, "weight": 0}]}
    path.write_text(json.dumps(muted) + "\n")
    with tuning.cluster.client() as client:
        version = build(client, path)
        rendering = client.renderings.create(Rendering(dataset_version=version.name, model="tiny"))
        ready = client.renderings.wait(rendering.name, timeout_seconds=WAIT)
        assert [(one.filename, one.line) for one in ready.unsupervised_records] == [("muted.jsonl", 1)]
        error = refused(lambda: client.jobs.create(job(ready.name, 5)))
    assert isinstance(error, errors.FailedPrecondition)
    assert error.reason == "NO_SUPERVISED_TOKENS"
    assert "muted.jsonl line 1" in error.message


@pytest.mark.parametrize("bad", BAD["renderings"], ids=lambda bad: bad["id"])
def test_a_bad_rendering_fails(tuning: Shared, tmp_path: Path, bad: dict[str, Any]) -> None:
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"messages": [USER, ASSISTANT, USER, ASSISTANT]}) + "\n")
    with tuning.cluster.client() as client:
        version = build(client, path)
        wanted = ParseDict(bad["settings"], Rendering(dataset_version=version.name, model="tiny"))

        def render() -> None:
            client.renderings.wait(client.renderings.create(wanted).name, timeout_seconds=WAIT)

        with pytest.raises((ResourceFailed, LuthierError), match=bad["said"]) as caught:
            render()
    assert caught.value.reason == bad["reason"]


def test_bad_jobs_and_models_are_refused(tuning: Shared) -> None:
    cluster, rendering = tuning.cluster, tuning.rendering
    outside = cluster.home.parent / "outside"
    make_tiny_model(outside)
    with cluster.client() as client, cluster.client("other") as other:
        version = client.renderings.get(rendering).dataset_version
        before = list(client.models.list()), list(client.jobs.list())
        cases: list[tuple[Callable[[], Any], type[LuthierError], str, str]] = [
            (
                lambda: client.jobs.create(
                    FineTuningJob(base_model="tiny", rendering=rendering, lora=LoraConfig(rank=0))
                ),
                errors.InvalidArgument,
                "INVALID_FIELD",
                "fine_tuning_job.lora.rank: must be in 1..512, got 0",
            ),
            (
                lambda: client.renderings.create(Rendering(dataset_version=version, model="missing")),
                errors.NotFound,
                "BASE_MODEL_MISSING",
                "projects/default/models/missing does not exist",
            ),
            (
                lambda: other.renderings.create(Rendering(dataset_version=version, model="tiny")),
                errors.InvalidArgument,
                "CROSS_PROJECT_REFERENCE",
                "must be in projects/other, got 'projects/default/datasets/things",
            ),
            (
                lambda: client.models.register_base(Model(directory="tiny"), model_id="stolen"),
                errors.InvalidArgument,
                "INVALID_FIELD",
                "model.directory: must be an absolute path, got 'tiny'",
            ),
        ]
        for call, kind, reason, said in cases:
            error = refused(call)
            assert isinstance(error, kind), repr(error)
            assert error.reason == reason
            assert said in error.message, error.message
        assert (list(client.models.list()), list(client.jobs.list())) == before
        stolen = client.models.register_base(Model(directory=str(outside)), model_id="stolen")
        with pytest.raises(ResourceFailed, match=str(outside)) as caught:
            client.models.wait(stolen.name, timeout_seconds=WAIT)
        assert caught.value.reason == "PATH_NOT_ALLOWED"


def test_bad_chunks_and_request_ids_are_refused(tuning: Shared) -> None:
    cluster = tuning.cluster
    key = bearer((cluster.home / "api-key").read_text().strip())
    request_id = "6f0f5c1e-3a71-4a55-8b3e-7a1f7f0c9a11"
    with grpc.insecure_channel(cluster.addresses["data"]) as channel:
        stub: Any = data_service_pb2_grpc.DataServiceStub(channel)
        start = data_service_pb2.StartUploadRequest(
            parent="projects/default", upload=Upload(filename="a.jsonl"), request_id=request_id
        )
        upload = stub.StartUpload(start, metadata=key)
        assert stub.StartUpload(start, metadata=key) == upload, "the same id gets the first answer"
        start.upload.filename = "b.jsonl"

        def write(**chunk: Any) -> None:
            request = data_service_pb2.WriteUploadRequest(name=upload.name, data=b"abc", **chunk)
            stub.WriteUpload(iter([request]), metadata=key)

        cases: list[tuple[Callable[[], Any], str, str]] = [
            (lambda: stub.StartUpload(start, metadata=key), "REQUEST_ID_REUSED", "used with another body"),
            (lambda: write(crc32=1), "CHECKSUM_MISMATCH", f"{zlib.crc32(b'abc'):08x}"),
            (lambda: write(crc32=zlib.crc32(b"abc"), offset=7), "OFFSET_MISMATCH", "7"),
        ]
        for call, reason, said in cases:
            with pytest.raises(grpc.RpcError) as caught:
                call()
            error = error_of(caught.value)
            assert isinstance(error, errors.InvalidArgument)
            assert error.reason == reason
            assert said in error.message.lower(), error.message
        stored = stub.GetUpload(data_service_pb2.GetUploadRequest(name=upload.name), metadata=key)
        assert stored.persisted_size_bytes == 0


def test_a_stale_epoch_is_refused(tuning: Shared) -> None:
    cluster = tuning.cluster
    key = bearer((cluster.home / "worker-key").read_text().strip())
    with grpc.insecure_channel(cluster.addresses["training"]) as channel:
        stub: Any = worker_service_pb2_grpc.WorkerServiceStub(channel)
        request = worker_service_pb2.HeartbeatRequest(task="gone", epoch=3)
        with pytest.raises(grpc.RpcError) as caught:
            stub.Heartbeat(request, metadata=key)
    error = error_of(caught.value)
    assert isinstance(error, errors.FailedPrecondition)
    assert error.reason == "LEASE_LOST"
    assert "'gone' is not leased at epoch 3" in error.message
