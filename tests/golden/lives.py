"""One resource of each kind, from its making to its purge, with workers that bring whatever is asked at once.

Nothing is trained or asked: what counts is what services store. Bytes are of each life alone, so that they must come
back, and a few are the same in all lives, so that they must stay.
"""

from __future__ import annotations

import hashlib
import struct
import time
import uuid
import zlib
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import grpc
from tests.golden.answers import Asker
from tests.golden.fake_worker import FakeWorker

from luthier.runtime.digests import files_digest
from luthier.v1 import dataset_pb2, evaluation_pb2, event_pb2, model_pb2, rendering_pb2
from luthier.v1.data_service_pb2 import WriteUploadRequest
from luthier.work.peers import error_of
from luthier.worker.v1 import task_pb2

DATA, TRAINING = "luthier.v1.DataService", "luthier.v1.TrainingService"
MODELS, EVALUATION = "luthier.v1.ModelService", "luthier.v1.EvaluationService"
PARENT = "projects/default"
BASE, VERSION = f"{PARENT}/models/base", f"{PARENT}/datasets/lasting/versions/v"
RENDERING = f"{PARENT}/renderings/lasting"
TEMPLATE = "{{ messages }}"
# Port 9 is nobody's: what is to be told there waits until it is purged with its job.
WEBHOOK = "http://127.0.0.1:9/ended"
# Holds between services end some seconds after the need.
_LAG_SECONDS = 4.0
_PATIENCE_SECONDS = 60.0


class Workers:
    """A worker of each service, which does what it is told."""

    def __init__(self, workers: Mapping[str, FakeWorker]) -> None:
        self._workers = workers
        for worker in workers.values():
            worker.start()

    def finish(self, service: str, subject: str, **result: Any) -> None:
        """Claim the task of a resource and end it; each file of the result is text by its path."""
        worker = self._workers[service]
        task = worker.claim(subject)
        worker.finish(task, task_pb2.TaskResult(**self._result(worker, task, **result)))

    def train(self, subject: str, text: str) -> None:
        """Claim a job; bring a metric, a checkpoint and an adapter."""
        worker = self._workers["training"]
        task = worker.claim(subject)
        metrics = event_pb2.MetricValues(values={"loss": 1.0})
        worker.report(task, [event_pb2.Event(step=1, metrics=metrics)])
        worker.commit(task, 1, "adapter_model.safetensors", f"checkpoint {text}".encode())
        paths = {"adapter_config.json": "{}", "adapter_model.safetensors": f"adapter {text}"}
        files = [worker.put(task, path, content.encode()) for path, content in paths.items()]
        worker.finish(task, task_pb2.TaskResult(train=task_pb2.TrainResult(files=files, step=1)))

    def _result(self, worker: FakeWorker, task: Any, *, kind: str, text: str) -> dict[str, Any]:
        def put(path: str, content: str | bytes) -> task_pb2.BlobFile:
            return worker.put(task, path, content.encode() if isinstance(content, str) else content)

        return {kind: _RESULTS[kind](put, text)}


def _built(put: Any, text: str) -> task_pb2.BuildVersionResult:
    splits = [
        dataset_pb2.SplitStatistics(split=split, num_records=2)
        for split in (dataset_pb2.SPLIT_TRAIN, dataset_pb2.SPLIT_TEST)
    ]
    return task_pb2.BuildVersionResult(
        shards=[task_pb2.Shard(file=put("rows", f"records {text}"), num_rows=4)],
        statistics=dataset_pb2.DatasetStatistics(splits=splits, num_records=4),
        digest=_digest(text),
        formats=[dataset_pb2.DATASET_FORMAT_PROMPT_COMPLETION],
        errors=[dataset_pb2.RecordError(filename="a", line=1, reason="R", message="m")],
    )


def _rendered(put: Any, text: str) -> task_pb2.RenderResult:
    lengths = rendering_pb2.LengthStatistics(count=4, sum=16, maximum=4)
    split = rendering_pb2.RenderingSplitStatistics(
        split=dataset_pb2.SPLIT_TRAIN, tokens=lengths, supervised_tokens=lengths
    )
    return task_pb2.RenderResult(
        shards=[task_pb2.Shard(file=put("rows", f"rows {text}"), num_rows=4)],
        split_statistics=[split],
        tokenizer=put("tokenizer.json", "the tokenizer of all"),
        digest=_digest(text),
    )


def _registered(put: Any, text: str) -> task_pb2.RegisterModelResult:
    def file(path: str, content: str, *, tokenizer: bool = False) -> model_pb2.ModelFile:
        put_file = put(path, content)
        return model_pb2.ModelFile(
            path=path, sha256=put_file.sha256, size_bytes=put_file.size_bytes, tokenizer=tokenizer
        )

    tokenizer = file("tokenizer.json", "the tokenizer of all", tokenizer=True)
    return task_pb2.RegisterModelResult(
        files=[file("model.safetensors", f"weights {text}"), tokenizer],
        architecture="LlamaForCausalLM",
        context_length=64,
        has_chat_template=True,
        tokenizer_digest=files_digest({tokenizer.path: tokenizer.sha256}),
    )


def _merged(put: Any, text: str) -> task_pb2.MergeResult:
    paths = {"config.json": "{}", "model.safetensors": f"merged {text}"}
    files = [put(path, content) for path, content in paths.items()]
    return task_pb2.MergeResult(files=files, check=model_pb2.WeightsCheck(num_positions=1))


def _evaluated(put: Any, text: str) -> task_pb2.EvaluateResult:
    asked: dict[str, Any] = {
        "template_source": evaluation_pb2.TEMPLATE_SOURCE_BASE,
        "template_date": "2026-11-28",
    }
    arms = [evaluation_pb2.ArmResult(arm_id=arm, **asked) for arm in ("base", "tuned")]
    rows = [
        evaluation_pb2.Prediction(row=row, reference=text).SerializeToString(deterministic=True)
        for row in range(2)
    ]
    ends = [0, len(rows[0]), len(rows[0]) + len(rows[1])]
    predictions = put("predictions", b"".join(rows) + struct.pack("<3Q", *ends))
    return task_pb2.EvaluateResult(arm_results=arms, num_records=2, predictions=predictions)


_RESULTS: Mapping[str, Any] = {
    "build_version": _built,
    "render": _rendered,
    "register_model": _registered,
    "merge": _merged,
    "evaluate": _evaluated,
}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """What a life has made, in the order in which it can be deleted: pieces of rpcs, and names."""

    when: float
    resources: list[tuple[str, str]] = field(default_factory=list)


class Lives:
    """Makes lives, and deletes and purges what they made once nothing needs it.

    `seconds` holds what each call took that changed something.
    """

    def __init__(self, asker: Asker, workers: Workers) -> None:
        self.seconds: list[float] = []
        self._asker = asker
        self._workers = workers
        self._made: deque[Made] = deque()

    def begin(self) -> None:
        """Make what all lives need and what stays: a model, a version and a rendering of it."""
        self._model("base")
        self._version("lasting")
        self._rendering("lasting", VERSION)

    def live(self, number: int) -> None:
        """Make one of each kind: with an even number all come to their end, with an odd one all are cancelled.

        What only a job or a merge that ended leaves, a tuned and a merged model, every other life has.
        """
        make = self._ended if number % 2 == 0 else self._cancelled
        self._made.append(Made(when=time.monotonic(), resources=list(make(f"l{number}"))))
        while self._made and self._made[0].when < time.monotonic() - _LAG_SECONDS:
            self._gone(self._made.popleft())

    def end(self) -> None:
        """Delete and purge what is left."""
        while self._made:
            self._gone(self._made.popleft())

    def _ended(self, life: str) -> Iterator[tuple[str, str]]:
        version = self._version(life)
        upload = self.call(f"{DATA}/GetDatasetVersion", {"name": version}).sources[0].upload
        rendering = self._rendering(life, version)
        model = self._model(life)
        job = self._create(f"{TRAINING}/CreateFineTuningJob", life, _job(life, rendering))
        self._workers.train(job, life)
        tuned = f"{PARENT}/models/{life}-tuned"
        merged = f"{PARENT}/models/{life}-merged"
        self.call(f"{MODELS}/MergeModel", {"name": tuned, "modelId": f"{life}-merged"})
        self._workers.finish("training", merged, kind="merge", text=life)
        evaluation = self._evaluation(life, VERSION, tuned)
        self._workers.finish("evaluation", evaluation, kind="evaluate", text=life)
        yield f"{EVALUATION}/{{}}ModelAlias", self._alias(life, tuned)
        yield f"{EVALUATION}/{{}}Evaluation", evaluation
        yield f"{MODELS}/{{}}Model", merged
        yield f"{MODELS}/{{}}Model", tuned
        yield f"{TRAINING}/{{}}FineTuningJob", job
        yield f"{MODELS}/{{}}Model", model
        yield f"{DATA}/{{}}Rendering", rendering
        yield f"{DATA}/{{}}DatasetVersion", version
        yield f"{DATA}/{{}}Dataset", version.partition("/versions/")[0]
        yield f"{DATA}/{{}}Upload", upload

    def _cancelled(self, life: str) -> Iterator[tuple[str, str]]:
        dataset = self._create(f"{DATA}/CreateDataset", life, {})
        upload = self._upload(life)
        version = self._create(
            f"{DATA}/CreateDatasetVersion", "v", {"sources": [{"upload": upload}]}, dataset
        )
        rendering = {"datasetVersion": VERSION, "model": BASE, "chatTemplate": TEMPLATE}
        received = self.call(
            f"{DATA}/StartUpload", {"parent": PARENT, "upload": {"filename": "a.jsonl"}}
        ).name
        self._asker.send(f"{DATA}/WriteUpload", [_chunk(received, b"never whole", finish=False)])
        yield f"{EVALUATION}/{{}}ModelAlias", self._alias(life, BASE)
        queued = [
            (f"{DATA}/{{}}DatasetVersion", version),
            (f"{DATA}/{{}}Rendering", self._create(f"{DATA}/CreateRendering", life, rendering)),
            (f"{MODELS}/{{}}Model", self._create(f"{MODELS}/RegisterBaseModel", life, {"directory": "/m"})),
            (
                f"{TRAINING}/{{}}FineTuningJob",
                self._create(f"{TRAINING}/CreateFineTuningJob", life, _job(life, RENDERING)),
            ),
            (f"{EVALUATION}/{{}}Evaluation", self._evaluation(life, VERSION, BASE)),
            (f"{DATA}/{{}}Upload", received),
        ]
        for rpc, name in queued:
            self.call(rpc.format("Cancel"), {"name": name})
            yield rpc, name
        yield f"{DATA}/{{}}Dataset", dataset
        yield f"{DATA}/{{}}Upload", upload

    def _gone(self, made: Made) -> None:
        """Delete all, bring each back and delete it again, and purge all: what needs others first, as it held them."""
        for rpc, name in made.resources:
            self._delete(rpc, name)
        deleted = [one for one in made.resources if not one[0].endswith("ModelAlias")]
        for rpc, name in reversed(deleted):
            self.call(rpc.format("Undelete"), {"name": name})
        for rpc, name in deleted:
            self._delete(rpc, name)
        for rpc, name in deleted:
            self.call(rpc.format("Purge"), {"name": name})

    def _delete(self, rpc: str, name: str) -> None:
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while True:
            try:
                self.call(rpc.format("Delete"), {"name": name})
                return
            except grpc.RpcError as error:
                if error_of(error).reason != "RESOURCE_IN_USE" or time.monotonic() > deadline:
                    raise
            time.sleep(0.2)

    def _version(self, life: str) -> str:
        dataset = self._create(f"{DATA}/CreateDataset", life, {"labels": {"life": life}})
        upload = {"sources": [{"upload": self._upload(life)}]}
        name = self._create(f"{DATA}/CreateDatasetVersion", "v", upload, dataset)
        self._workers.finish("data", name, kind="build_version", text=life)
        return name

    def _upload(self, life: str) -> str:
        name: str = self.call(
            f"{DATA}/StartUpload", {"parent": PARENT, "upload": {"filename": "a.jsonl"}}
        ).name
        data = f"upload {life}".encode()
        written = self._asker.send(f"{DATA}/WriteUpload", [_chunk(name, data)])
        assert written.persisted_size_bytes == len(data)
        return name

    def _rendering(self, life: str, version: str) -> str:
        wanted = {"datasetVersion": version, "model": BASE, "chatTemplate": TEMPLATE}
        name = self._create(f"{DATA}/CreateRendering", life, wanted)
        self._workers.finish("data", name, kind="render", text=life)
        return name

    def _model(self, life: str) -> str:
        name = self._create(
            f"{MODELS}/RegisterBaseModel", life, {"directory": "/m", "labels": {"life": life}}
        )
        self._workers.finish("training", name, kind="register_model", text=life)
        return name

    def _evaluation(self, life: str, version: str, tuned: str) -> str:
        arms = [{"armId": "base", "model": BASE}, {"armId": "tuned", "model": tuned}]
        wanted = {"datasetVersion": version, "arms": arms, "webhooks": [{"url": WEBHOOK}]}
        return self._create(f"{EVALUATION}/CreateEvaluation", life, wanted)

    def _alias(self, life: str, model: str) -> str:
        alias = self._create(f"{EVALUATION}/CreateModelAlias", life, {})
        self.call(f"{EVALUATION}/MoveModelAlias", {"name": alias, "model": model})
        return alias

    def _create(self, rpc: str, last: str, wanted: Mapping[str, Any], parent: str = PARENT) -> str:
        field_name = _FIELDS[rpc.rpartition("/")[2]]
        request = {
            "parent": parent,
            f"{field_name}Id": last,
            field_name: wanted,
            "requestId": str(uuid.uuid4()),
        }
        name: str = self.call(rpc, request).name
        return name

    def call(self, rpc: str, request: Mapping[str, Any]) -> Any:
        """Call, and note how long it took."""
        began = time.monotonic()
        try:
            return self._asker.send(rpc, request)
        finally:
            self.seconds.append(time.monotonic() - began)


_FIELDS = {
    "CreateDataset": "dataset",
    "CreateDatasetVersion": "datasetVersion",
    "CreateRendering": "rendering",
    "RegisterBaseModel": "model",
    "CreateFineTuningJob": "fineTuningJob",
    "CreateEvaluation": "evaluation",
    "CreateModelAlias": "modelAlias",
}


def _chunk(name: str, data: bytes, *, finish: bool = True) -> WriteUploadRequest:
    return WriteUploadRequest(name=name, data=data, crc32=zlib.crc32(data), finish=finish)


def _job(life: str, rendering: str) -> dict[str, Any]:
    hyperparameters = {"batchRows": 4, "maxSteps": "1"}
    return {
        "baseModel": BASE,
        "rendering": rendering,
        "tunedModelId": f"{life}-tuned",
        "hyperparameters": hyperparameters,
        "webhooks": [{"url": WEBHOOK}],
    }
