"""One resource of each kind, from its making to its purge, with workers that bring whatever is asked at once.

Nothing is trained or asked: what counts is what services store. Bytes are of each life alone, so that they must come
back, and a few are the same in all lives, so that they must stay.
"""

from __future__ import annotations

import time
import uuid
import zlib
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grpc
from tests.golden.answers import Asker
from tests.golden.bringing import Workers
from tests.golden.kinds import kind_of

from luthier.v1.data_service_pb2 import WriteUploadRequest
from luthier.work.peers import error_of

DATA, TRAINING = "luthier.v1.DataService", "luthier.v1.TrainingService"
MODELS, EVALUATION = "luthier.v1.ModelService", "luthier.v1.EvaluationService"
PARENT = "projects/default"
BASE, VERSION = f"{PARENT}/models/base", f"{PARENT}/datasets/lasting/versions/v"
RENDERING, PAIRS = f"{PARENT}/renderings/lasting", f"{PARENT}/renderings/pairs"
TEMPLATE = "{{ messages }}"
# Port 9 is nobody's: what is to be told there waits until it is purged with its job.
WEBHOOK = "http://127.0.0.1:9/ended"
_UPLOAD = f"{DATA}/{{}}Upload"
_PATIENCE_SECONDS = 60.0
_GONE = object()


class Lives:
    """Makes lives, and deletes and purges what they made as soon as nothing needs it.

    `seconds` holds what each call took that changed something, and `seen` how many of each kind there were that have
    gone: resources as they were purged, and what jobs had as it was listed.
    """

    def __init__(self, asker: Asker, workers: Workers) -> None:
        self.seconds: list[float] = []
        self.seen: Counter[str] = Counter()
        self._asker = asker
        self._workers = workers
        self._leaving: deque[Iterator[None]] = deque()

    def begin(self) -> None:
        """Make what all lives need and what stays: a model, a version and renderings of it."""
        self._model("base")
        self._version("lasting")
        self._rendering("lasting", VERSION)
        self._rendering("pairs", VERSION, "PREFERENCE")

    def live(self, number: int) -> None:
        """Have former lives go on to leave; make one of each kind, all of which come to their end.

        With an odd number another one is made of each that can be cancelled, and is. What ended in a life of an even
        number is brought back once before it is purged, and so is all that was cancelled.
        """
        self._go_on()
        ended = list(self._ended(f"l{number}"))
        self._leaving.append(self._leave(ended, comes_back=number % 2 == 0))
        if number % 2:
            receiving = self._receiving()
            cancelled = [*self._cancelled(f"c{number}"), (_UPLOAD, receiving)]
            self._leaving.append(self._leave(cancelled, comes_back=True, receiving=receiving))

    def end(self) -> None:
        """Delete and purge what is left."""
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while self._leaving:
            assert time.monotonic() < deadline, f"{len(self._leaving)} lives do not go"
            time.sleep(0.2)
            self._go_on()

    def _go_on(self) -> None:
        """Have every life that leaves go as far as it can now."""
        for _ in range(len(self._leaving)):
            leaving = self._leaving.popleft()
            if next(leaving, _GONE) is not _GONE:
                self._leaving.append(leaving)

    def _ended(self, life: str) -> Iterator[tuple[str, str]]:
        """Make what comes to its end, and yield it in the order in which it can be deleted."""
        version = self._version(life)
        upload = self.call(f"{DATA}/GetDatasetVersion", {"name": version}).sources[0].upload
        rendering = self._rendering(life, version, "PROMPT")
        model = self._model(life)
        job = self._create(f"{TRAINING}/CreateFineTuningJob", life, _job(life, rendering, _DRAWING))
        self._workers.train(job, life, draws=True)
        valuing = f"{life}-reward"
        reward = self._create(f"{TRAINING}/CreateFineTuningJob", valuing, _job(valuing, PAIRS, _VALUING))
        self._workers.train(reward, valuing)
        self._list_parts(job)
        tuned = f"{PARENT}/models/{life}-tuned"
        merged, exported = f"{PARENT}/models/{life}-merged", f"{PARENT}/models/{life}-exported"
        self.call(f"{MODELS}/MergeModel", {"name": tuned, "modelId": f"{life}-merged"})
        self._workers.finish("training", merged, kind="merge", text=life)
        form = {"modelId": f"{life}-exported", "format": "EXPORT_FORMAT_GGUF_F16"}
        self.call(f"{MODELS}/ExportModel", {"name": tuned, **form})
        self._workers.finish("training", exported, kind="export", text=life)
        evaluation = self._evaluation(life, tuned)
        self._workers.evaluate(evaluation, life)
        yield f"{EVALUATION}/{{}}ModelAlias", self._alias(life, tuned)
        yield f"{EVALUATION}/{{}}Evaluation", evaluation
        for made in (exported, merged, tuned, f"{PARENT}/models/{valuing}-tuned"):
            yield f"{MODELS}/{{}}Model", made
        yield f"{TRAINING}/{{}}FineTuningJob", job
        yield f"{TRAINING}/{{}}FineTuningJob", reward
        yield f"{MODELS}/{{}}Model", model
        yield f"{DATA}/{{}}Rendering", rendering
        yield f"{DATA}/{{}}DatasetVersion", version
        yield f"{DATA}/{{}}Dataset", version.partition("/versions/")[0]
        yield _UPLOAD, upload

    def _list_parts(self, job: str) -> None:
        checkpoints = self._asker.send(f"{TRAINING}/ListCheckpoints", {"parent": job}).checkpoints
        rollouts = self._asker.send(f"{TRAINING}/ListRollouts", {"parent": job}).rollouts
        self.seen.update(map(kind_of, (*checkpoints, *rollouts)))

    def _cancelled(self, life: str) -> Iterator[tuple[str, str]]:
        """Make what is cancelled before a worker has it, and yield it in the order in which it can be deleted."""
        dataset = self._create(f"{DATA}/CreateDataset", life, {})
        upload = self._upload(life)
        version = self._create(
            f"{DATA}/CreateDatasetVersion", "v", {"sources": [{"upload": upload}]}, dataset
        )
        rendering = {"datasetVersion": VERSION, "model": BASE, "chatTemplate": TEMPLATE}
        yield f"{EVALUATION}/{{}}ModelAlias", self._alias(life, BASE)
        queued = [
            (f"{DATA}/{{}}DatasetVersion", version),
            (f"{DATA}/{{}}Rendering", self._create(f"{DATA}/CreateRendering", life, rendering)),
            (f"{MODELS}/{{}}Model", self._create(f"{MODELS}/RegisterBaseModel", life, {"directory": "/m"})),
            (
                f"{TRAINING}/{{}}FineTuningJob",
                self._create(f"{TRAINING}/CreateFineTuningJob", life, _job(life, RENDERING)),
            ),
            (f"{EVALUATION}/{{}}Evaluation", self._evaluation(life, BASE, max_workers=2)),
        ]
        for rpc, name in queued:
            self.call(rpc.format("Cancel"), {"name": name})
            yield rpc, name
        yield f"{DATA}/{{}}Dataset", dataset
        yield _UPLOAD, upload

    def _leave(
        self, made: Sequence[tuple[str, str]], *, comes_back: bool, receiving: str = ""
    ) -> Iterator[None]:
        """Delete all, perhaps bring each back and delete it again, and purge all: what needs others first.

        Yields wherever something is needed still: what needed it is let go some seconds later.
        """
        if receiving:
            self.call(_UPLOAD.format("Cancel"), {"name": receiving})
        for rpc, name in made:
            yield from self._deleted(rpc, name)
        lasting = [one for one in made if not one[0].endswith("ModelAlias")]
        again = lasting if comes_back else []
        for rpc, name in reversed(again):
            self.call(rpc.format("Undelete"), {"name": name})
        for rpc, name in again:
            yield from self._deleted(rpc, name)
        for rpc, name in lasting:
            self.seen[kind_of(self.call(rpc.format("Purge"), {"name": name}))] += 1

    def _deleted(self, rpc: str, name: str) -> Iterator[None]:
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while True:
            try:
                deleted = self.call(rpc.format("Delete"), {"name": name})
                break
            except grpc.RpcError as error:
                if error_of(error).reason != "RESOURCE_IN_USE" or time.monotonic() > deadline:
                    raise
            yield
        if rpc.endswith("ModelAlias"):
            # It cannot be brought back, nor purged by hand.
            self.seen[kind_of(deleted)] += 1

    def _version(self, life: str) -> str:
        dataset = self._create(f"{DATA}/CreateDataset", life, {})
        upload = {"sources": [{"upload": self._upload(life)}]}
        name = self._create(f"{DATA}/CreateDatasetVersion", "v", upload, dataset)
        self._workers.finish("data", name, kind="build_version", text=life)
        return name

    def _receiving(self) -> str:
        """Begin an upload, and do not end it."""
        name: str = self.call(
            f"{DATA}/StartUpload", {"parent": PARENT, "upload": {"filename": "a.jsonl"}}
        ).name
        self._asker.send(f"{DATA}/WriteUpload", [_chunk(name, b"never whole", finish=False)])
        return name

    def _upload(self, life: str) -> str:
        name: str = self.call(
            f"{DATA}/StartUpload", {"parent": PARENT, "upload": {"filename": "a.jsonl"}}
        ).name
        data = f"upload {life}".encode()
        written = self._asker.send(f"{DATA}/WriteUpload", [_chunk(name, data)])
        assert written.persisted_size_bytes == len(data)
        return name

    def _rendering(self, life: str, version: str, kind: str = "SUPERVISED") -> str:
        kinds = {"kind": f"RENDERING_KIND_{kind}"}
        wanted = {"datasetVersion": version, "model": BASE, "chatTemplate": TEMPLATE, **kinds}
        name = self._create(f"{DATA}/CreateRendering", life, wanted)
        self._workers.finish("data", name, kind="render", text=life)
        return name

    def _model(self, life: str) -> str:
        name = self._create(f"{MODELS}/RegisterBaseModel", life, {"directory": "/m"})
        self._workers.finish("training", name, kind="register_model", text=life)
        return name

    def _evaluation(self, life: str, tuned: str, max_workers: int = 1) -> str:
        arms = [{"armId": "base", "model": BASE}, {"armId": "tuned", "model": tuned}]
        wanted = {
            "datasetVersion": VERSION,
            "arms": arms,
            "maxWorkers": max_workers,
            "webhooks": [{"url": WEBHOOK}],
        }
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
            field_name: {"labels": {"life": last}, **wanted},
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


_SUPERVISED: Mapping[str, Any] = {}
_VALUING: Mapping[str, Any] = {"rewardModel": {}}
_GRADER = {"input": "{{sample.output_text}}", "reference": "red", "operation": "OPERATION_EQ"}
_DRAWING: Mapping[str, Any] = {"reinforcement": {"grader": {"stringCheck": _GRADER}, "maxNewTokens": 4}}


def _chunk(name: str, data: bytes, *, finish: bool = True) -> WriteUploadRequest:
    return WriteUploadRequest(name=name, data=data, crc32=zlib.crc32(data), finish=finish)


def _job(life: str, rendering: str, method: Mapping[str, Any] = _SUPERVISED) -> dict[str, Any]:
    hyperparameters = {"batchRows": 4, "maxSteps": "1"}
    return {
        "baseModel": BASE,
        "rendering": rendering,
        "tunedModelId": f"{life}-tuned",
        "hyperparameters": hyperparameters,
        "webhooks": [{"url": WEBHOOK}],
        **method,
    }
