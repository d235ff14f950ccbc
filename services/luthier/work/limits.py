"""How long a task may take for the work it announces, and how long it may stand still."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from luthier.work.tasks import TaskKind
from luthier.worker.v1 import task_pb2


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Time limits of one kind of task.

    Attributes:
        stall_seconds: a runner that neither computes nor asks anything of its context for this long is stalled.
        base_seconds: time that any task of the kind may take; None: no limit but the stall.
        seconds_per_record: added for each record that the task's files hold.
        seconds_per_mib: added for each MiB of the task's files.
    """

    stall_seconds: float
    base_seconds: float | None = None
    seconds_per_record: float = 0.0
    seconds_per_mib: float = 0.0


# Some fifty times what the work takes on two slow cores: nobody's honest work ends, and a template that is slow
# on every record holds its slot for minutes instead of days.
LIMITS: Mapping[TaskKind, Limits] = MappingProxyType(
    {
        TaskKind.BUILD_VERSION: Limits(stall_seconds=600.0, base_seconds=300.0, seconds_per_mib=10.0),
        TaskKind.RENDER: Limits(
            stall_seconds=600.0, base_seconds=300.0, seconds_per_record=0.05, seconds_per_mib=10.0
        ),
        # The size of what the Hub sends is not known beforehand.
        TaskKind.REGISTER_MODEL: Limits(stall_seconds=1800.0, base_seconds=12 * 3600.0),
        TaskKind.TRAIN: Limits(stall_seconds=1800.0),
        TaskKind.MERGE: Limits(stall_seconds=1800.0, base_seconds=12 * 3600.0),
        TaskKind.EXPORT: Limits(stall_seconds=1800.0, base_seconds=12 * 3600.0),
        # Its runner adds `answering_seconds` once it knows the records; the base is for what it fetches and waits for.
        TaskKind.EVALUATE: Limits(stall_seconds=1800.0, base_seconds=12 * 3600.0),
        TaskKind.ANSWER_SHARE: Limits(stall_seconds=1800.0, base_seconds=12 * 3600.0),
    }
)

SLOTS: Mapping[TaskKind, int] = MappingProxyType(
    {
        TaskKind.BUILD_VERSION: 3,
        TaskKind.RENDER: 3,
        TaskKind.REGISTER_MODEL: 2,
        TaskKind.TRAIN: 1,
        TaskKind.EVALUATE: 1,
        TaskKind.MERGE: 1,
        TaskKind.EXPORT: 1,
        TaskKind.ANSWER_SHARE: 1,
    }
)
"""Tasks of a kind that one worker runs at a time: one where a task takes the memory of a model in training."""

KEPT_SLOTS: frozenset[TaskKind] = frozenset({TaskKind.BUILD_VERSION, TaskKind.RENDER})
"""Kinds of which no project is given the last slot of a worker while it holds all the others.

One's slow templates so leave room for another's work; what takes much memory has no slot to spare.
"""

PROJECT_SLOTS: Mapping[TaskKind, int] = MappingProxyType(
    {kind: slots - (kind in KEPT_SLOTS) for kind, slots in SLOTS.items()}
)
"""Tasks of a kind that one worker runs at a time for one project."""

IN_SLOTS_OF: Mapping[TaskKind, TaskKind] = MappingProxyType({TaskKind.ANSWER_SHARE: TaskKind.EVALUATE})
"""Kinds that take the slots of another one: it is the same work."""


def kinds_with_room(
    kinds: Iterable[TaskKind], held: Iterable[TaskKind], slots: Mapping[TaskKind, int] = SLOTS
) -> tuple[TaskKind, ...]:
    """Return those of `kinds` that a worker may take one more task of, beside those that it holds (their kinds)."""
    taken = Counter(IN_SLOTS_OF.get(kind, kind) for kind in held)
    return tuple(kind for kind in kinds if taken[IN_SLOTS_OF.get(kind, kind)] < slots[kind])


SECONDS_PER_ANSWER = 600.0
"""What a prompt of some thousand tokens may take of a model with billions of weights on two slow cores."""
SECONDS_PER_TOKEN = 1.0


def answering_seconds(num_answers: int, max_new_tokens: int) -> float:
    """Return how long answers of so many tokens may take, all of them together."""
    return num_answers * (SECONDS_PER_ANSWER + SECONDS_PER_TOKEN * max_new_tokens)


def kind_of(task: task_pb2.Task) -> TaskKind:
    """Return the kind of a specified task."""
    name = task.WhichOneof("spec")
    assert name is not None, "the service specifies every task"
    return TaskKind(name.upper())


def allowed_seconds(task: task_pb2.Task, limits: Limits) -> float | None:
    """Return how long a task may take for the files and records of its specification; None: no limit."""
    if limits.base_seconds is None:
        return None
    files = [source.file for source in task.build_version.sources]
    files += [shard.file for shard in task.render.shards]
    num_records = sum(shard.num_rows for shard in task.render.shards)
    mib = sum(file.size_bytes for file in files) / (1 << 20)
    return limits.base_seconds + limits.seconds_per_record * num_records + limits.seconds_per_mib * mib
