"""Tasks: units of heavy work that workers claim under a lease."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from luthier.errors.failure import Failure
from luthier.work.requirements import Equipment, Requirements
from luthier.worker.v1 import task_pb2


class TaskKind(StrEnum):
    """What a task does."""

    BUILD_VERSION = "BUILD_VERSION"
    RENDER = "RENDER"
    REGISTER_MODEL = "REGISTER_MODEL"
    TRAIN = "TRAIN"
    EVALUATE = "EVALUATE"
    MERGE = "MERGE"
    EXPORT = "EXPORT"
    ANSWER_SHARE = "ANSWER_SHARE"


class TaskState(StrEnum):
    """Where a task stands in the queue."""

    QUEUED = "QUEUED"
    LEASED = "LEASED"
    PAUSED = "PAUSED"
    DONE = "DONE"


@dataclass(frozen=True, slots=True, kw_only=True)
class NewTask:
    """A task to queue.

    Attributes:
        kind: what to do.
        uid: uid of the resource that the task works for.
        subject: the resource's name.
        project: project id of the subject.
        resources: names of resources at other services that the task's token may read.
        required: what a worker must have to be given it.
        share: which share of the resource's work it is, from 1; 0: the whole. One task a resource and share.
    """

    kind: TaskKind
    uid: str
    subject: str
    project: str
    resources: tuple[str, ...] = ()
    required: Requirements = field(default_factory=Requirements)
    share: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A queued, leased, paused or finished task.

    Attributes:
        task_id: id within the service.
        kind: what to do.
        uid: uid of the resource that the task works for.
        subject: the resource's name.
        project: project id of the subject.
        resources: names of resources at other services that the task's token may read.
        state: where the task stands.
        epoch: fencing number, raised by every claim; a report with another epoch is refused.
        attempt: claims so far.
        worker: who holds or last held the lease; empty before the first claim.
        cancel_requested: whether the holder is to stop.
        last_local_number: highest event number recorded from the current epoch.
        losses: attempts lost since it was queued or since its last checkpoint; those given back not counted.
        heard: whether the holder ever spoke of the task: if not, the answer to its claim may have been lost.
        share: which share of the resource's work it is, from 1; 0: the whole.
        traceparent: what asked for it; empty: nobody kept that.
        attempt_traceparent: its last attempt; empty likewise.
        pause_requested: whether the holder is to leave a checkpoint and give it back, to be given to none.
    """

    task_id: str
    kind: TaskKind
    uid: str
    subject: str
    project: str
    resources: tuple[str, ...]
    state: TaskState
    epoch: int
    attempt: int
    worker: str
    cancel_requested: bool
    last_local_number: int
    losses: int
    heard: bool
    share: int = 0
    traceparent: str = ""
    attempt_traceparent: str = ""
    pause_requested: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What a call that claims a task asks for.

    Attributes:
        worker: who holds the lease then.
        kinds: kinds that it has a free slot for; none: only a task that the same claim brought before.
        claim: id of the claim; empty: it has none.
        equipment: what the worker has.
    """

    worker: str
    kinds: Sequence[TaskKind]
    claim: str = ""
    equipment: Equipment = field(default_factory=Equipment)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a worker says that its work ended: failed with `failure`, stopped or paused on request, or done."""

    failure: Failure | None = None
    cancelled: bool = False
    paused: bool = False
    result: task_pb2.TaskResult | None = None
