"""Checkpoints as workers hand them in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from luthier.work.tasks import Task
from luthier.worker.v1.task_pb2 import BlobFile
from luthier.worker.v1.worker_service_pb2 import CommitCheckpointRequest

FILE = BlobFile(path="state", sha256="0123456789abcdef" * 4, size_bytes=3)


def checkpoint_of(
    task: Task, step: int, files: Sequence[BlobFile] = (FILE,), metrics: Mapping[str, float] | None = None
) -> CommitCheckpointRequest:
    """A checkpoint of a task that is leased."""
    return CommitCheckpointRequest(
        task=task.task_id, epoch=task.epoch, step=step, files=files, metrics=metrics or {}
    )
