"""Workers that bring whatever is asked at once: nothing is trained or asked, and each text is of one life alone."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from google.protobuf.message import Message
from tests.golden.fake_worker import FakeWorker

from luthier.runtime.digests import files_digest
from luthier.v1 import dataset_pb2, evaluation_pb2, event_pb2, model_pb2, rendering_pb2, rollout_pb2
from luthier.worker.v1 import task_pb2


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

    def train(self, subject: str, text: str, *, draws: bool = False) -> None:
        """Claim a job; bring a metric, what it drew if it draws, a checkpoint and an adapter."""
        worker = self._workers["training"]
        task = worker.claim(subject)
        metrics = event_pb2.MetricValues(values={"loss": 1.0})
        worker.report(task, [event_pb2.Event(step=1, metrics=metrics)])
        if draws:
            drawn = [rollout_pb2.Rollout(step=1, sample=sample, output_text=text) for sample in range(2)]
            worker.roll_out(task, 1, _rows(drawn), len(drawn))
        worker.commit(task, 1, "adapter_model.safetensors", f"checkpoint {text}".encode())
        paths = {"adapter_config.json": "{}", "adapter_model.safetensors": f"adapter {text}"}
        files = [worker.put(task, path, content.encode()) for path, content in paths.items()]
        worker.finish(task, task_pb2.TaskResult(train=task_pb2.TrainResult(files=files, step=1)))

    def evaluate(self, subject: str, text: str) -> None:
        """Claim an evaluation; bring answers of a first arm, and then the whole."""
        worker = self._workers["evaluation"]
        task = worker.claim(subject)
        worker.commit(task, 1, "answers", f"answers {text}".encode())
        result = _evaluated(lambda path, content: worker.put(task, path, content), text)
        worker.finish(task, task_pb2.TaskResult(evaluate=result))

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


def _exported(put: Any, text: str) -> task_pb2.ExportResult:
    check = model_pb2.WeightsCheck(num_positions=1)
    return task_pb2.ExportResult(files=[put("model.gguf", f"exported {text}")], check=check)


def _evaluated(put: Any, text: str) -> task_pb2.EvaluateResult:
    asked: dict[str, Any] = {
        "template_source": evaluation_pb2.TEMPLATE_SOURCE_BASE,
        "template_date": "2026-11-28",
    }
    arms = [evaluation_pb2.ArmResult(arm_id=arm, **asked) for arm in ("base", "tuned")]
    rows = [evaluation_pb2.Prediction(row=row, reference=text) for row in range(2)]
    predictions = put("predictions", _rows(rows))
    return task_pb2.EvaluateResult(arm_results=arms, num_records=2, predictions=predictions)


_RESULTS: Mapping[str, Any] = {
    "build_version": _built,
    "render": _rendered,
    "register_model": _registered,
    "merge": _merged,
    "export": _exported,
}


def _rows(messages: Sequence[Message]) -> bytes:
    """Messages one after another, then where each begins, and where the last one ends."""
    rows = [message.SerializeToString(deterministic=True) for message in messages]
    ends = [0, *accumulate(map(len, rows))]
    return b"".join(rows) + struct.pack(f"<{len(ends)}Q", *ends)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
