"""Whether a worker is there that can be given a task, and in words why none is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

from luthier.errors import Failure, Reason
from luthier.work.requirements import Equipment, Requirements, Unmet
from luthier.work.tasks import TaskKind

_NAMED = 4
_WORK_OF = {
    TaskKind.BUILD_VERSION: "data",
    TaskKind.RENDER: "data",
    TaskKind.REGISTER_MODEL: "training",
    TaskKind.TRAIN: "training",
    TaskKind.MERGE: "training",
    TaskKind.EXPORT: "training",
    TaskKind.EVALUATE: "evaluation",
    TaskKind.ANSWER_SHARE: "evaluation",
}
"""The service whose workers take a kind of task."""


class Equipped(Protocol):
    """A worker, as far as it matters what it can be given."""

    @property
    def worker_id(self) -> str:
        """Its id."""

    @property
    def kinds(self) -> Sequence[TaskKind]:
        """The kinds of task that it takes."""

    @property
    def equipment(self) -> Equipment:
        """What it computes with."""


def failure_of(kind: TaskKind, required: Requirements, workers: Sequence[Equipped]) -> Failure | None:
    """Return why none of some workers can be given a task; None where one can.

    `metadata["requirement"]` names the first that nobody meets who meets those before it: kind, device, memory, ranks.
    """
    able = sorted((one for one in workers if kind in one.kinds), key=lambda one: one.worker_id)
    lacks = [one.equipment.unmet(required) for one in able]
    if () in lacks:
        return None
    if not able:
        service = _WORK_OF[kind]
        return _unmet(
            kind, "kind", f"no {service} worker is there to do it; start one: luthierd worker {service}"
        )
    told = [f"{one.worker_id} {one.equipment}" for one in able[:_NAMED]]
    more = [f"{len(able) - _NAMED} more"] if len(able) > _NAMED else []
    text = f"no worker that is there can do it: it requires {required}; {', '.join([*told, *more])}"
    wanting = _wanting(lacks)
    if wanting == "ranks":
        text += f"; start one: luthierd worker training --executor torchrun --ranks {required.num_ranks}"
    return _unmet(kind, wanting, text)


def _wanting(lacks: Sequence[Sequence[Unmet]]) -> Unmet:
    """Return the first of what is required that nobody has who has what comes before it."""
    before: Sequence[Unmet] = ("device", "memory")
    for name in before:
        lacks = [one for one in lacks if name not in one]
        if not lacks:
            return name
    return "ranks"


def _unmet(kind: TaskKind, requirement: Literal["kind"] | Unmet, text: str) -> Failure:
    metadata = {"requirement": requirement, "kind": kind.value}
    return Failure(code="UNAVAILABLE", reason=Reason.NO_FITTING_WORKER, message=text, metadata=metadata)
