"""One rank: a training in a process of its own."""

from __future__ import annotations

from collections.abc import Callable

from luthier.training.executors.ranks import ranks_for
from luthier.training.worker.order import TrainOrder
from luthier.training.worker.train import TaskDesk
from luthier.work.children import Calls, Children
from luthier.work.context import TaskContext
from luthier.worker.v1 import task_pb2

STEP = "metrics"
"""The call that a training makes after each step."""
_CALLS = (
    "progress",
    "metrics",
    "log",
    "run_record",
    "fetch",
    "fetch_into",
    "begin_checkpoint",
    "checkpoint_stored",
    "commit_rollouts",
    "scored",
)
_NEARLY_SECONDS = 20.0
"""So long before its end a training lets the process of the next one prepare: about as long as that takes, twice."""


class InChild:
    """Trains in a process of its own, one of `children`."""

    def __init__(self, children: Children) -> None:
        self._children = children

    def __call__(self, order: TrainOrder, desk: TaskDesk, context: TaskContext) -> task_pb2.TrainResult:
        """Return what the process made.

        Raises:
            Unavailable: TOO_FEW_RANKS, the job takes more than one; CRASHED or STALLED.
            LuthierError: as `Children.run`.
        """
        ranks_for(order.task.train.job, 1)
        calls = calls_of(desk, self._children)
        result: task_pb2.TrainResult = self._children.run(order, calls, context, STEP)
        return result


def calls_of(desk: TaskDesk, children: Children) -> Calls:
    """Return what a training may tell its driver and ask of it; the next process prepares when it is nearly done."""
    return {**{name: getattr(desk, name) for name in _CALLS}, "progress": _warming(desk, children)}


def _warming(desk: TaskDesk, children: Children) -> Callable[..., None]:
    def progress(
        phase: str, completed: int, total: int, unit: str, *, remaining_seconds: float, step: int
    ) -> None:
        desk.progress(phase, completed, total, unit, remaining_seconds=remaining_seconds, step=step)
        if step and remaining_seconds < _NEARLY_SECONDS:
            children.warm()

    return progress
