"""A worker that claims a task and says no more, or what it is told: states that a real one passes in a moment."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
from google.rpc import code_pb2, status_pb2

from luthier.worker.v1 import task_pb2, worker_service_pb2, worker_service_pb2_grpc

_KINDS = {
    "data": (task_pb2.TASK_KIND_BUILD_VERSION, task_pb2.TASK_KIND_RENDER),
    "training": (task_pb2.TASK_KIND_REGISTER_MODEL, task_pb2.TASK_KIND_TRAIN),
    "evaluation": (task_pb2.TASK_KIND_EVALUATE,),
}


class FakeWorker:
    """One worker id of a service; each claim is made by a new process, as after a crash."""

    def __init__(
        self, home: Path, service: str, address: str, name: str, kinds: Sequence[Any] | None = None
    ) -> None:
        """`kinds` are those of the tasks that it takes; None: all that there were at first."""
        self._kinds = _KINDS[service] if kinds is None else kinds
        self._name = name
        self._stub = worker_service_pb2_grpc.WorkerServiceStub(grpc.insecure_channel(address))
        self._metadata = [("authorization", f"Bearer {(home / 'worker-key').read_text().strip()}")]
        self._processes = 0

    def start(self) -> None:
        """Register a new process in the place of the former one, whose tasks are lost with it."""
        self._processes += 1
        request = worker_service_pb2.RegisterWorkerRequest(
            worker=self._name, kinds=self._kinds, instance=f"{self._name}{self._processes}"
        )
        if "lock" in request.DESCRIPTOR.fields_by_name:
            request.lock = f"lock{self._name}"
        self._call("RegisterWorker", request)

    def claim(self, subject: str) -> Any:
        """Claim the one task that waits, which must be the subject's; its lease is held until it runs out."""
        request = worker_service_pb2.ClaimTaskRequest(worker=self._name, wait_seconds=10)
        task = self._call("ClaimTask", request).task
        assert task.subject == subject, f"{task.subject or 'nothing'} waits, not {subject}"
        self._call("Heartbeat", worker_service_pb2.HeartbeatRequest(task=task.task, epoch=task.epoch))
        return task

    def fail(self, task: Any, message: str) -> None:
        """Hand in a failure."""
        error = status_pb2.Status(code=code_pb2.FAILED_PRECONDITION, message=message)
        self._call(
            "FinishTask", worker_service_pb2.FinishTaskRequest(task=task.task, epoch=task.epoch, error=error)
        )

    def finish(self, task: Any, result: Any) -> None:
        """Hand in a result."""
        request = worker_service_pb2.FinishTaskRequest(task=task.task, epoch=task.epoch, result=result)
        self._call("FinishTask", request)

    def put(self, task: Any, path: str, data: bytes) -> task_pb2.BlobFile:
        """Send a file."""
        sha256 = hashlib.sha256(data).hexdigest()
        request = worker_service_pb2.PutBlobRequest(
            task=task.task, epoch=task.epoch, sha256=sha256, data=data
        )
        self._call("PutBlob", iter([request]))
        return task_pb2.BlobFile(path=path, sha256=sha256, size_bytes=len(data))

    def report(self, task: Any, events: Sequence[Any]) -> None:
        """Tell of events, for the first time under this lease."""
        told = [
            worker_service_pb2.LocalEvent(local_number=number, event=event)
            for number, event in enumerate(events, start=1)
        ]
        request = worker_service_pb2.ReportEventsRequest(task=task.task, epoch=task.epoch, events=told)
        self._call("ReportEvents", request)

    def commit(self, task: Any, step: int, path: str, data: bytes) -> None:
        """Commit a checkpoint of one file."""
        request = worker_service_pb2.CommitCheckpointRequest(
            task=task.task, epoch=task.epoch, step=step, files=[self.put(task, path, data)]
        )
        self._call("CommitCheckpoint", request)

    def roll_out(self, task: Any, step: int, data: bytes, num_rollouts: int) -> None:
        """Commit what a step drew, as a file of rows."""
        file = self.put(task, f"rollouts/step-{step}", data)
        request = worker_service_pb2.CommitRolloutsRequest(
            task=task.task, epoch=task.epoch, step=step, file=file, num_rollouts=num_rollouts
        )
        self._call("CommitRollouts", request)

    def _call(self, name: str, request: Any) -> Any:
        return getattr(self._stub, name)(request, timeout=30, metadata=self._metadata)
