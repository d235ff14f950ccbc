"""One rank: a training in a process of its own."""

from __future__ import annotations

from luthier.training.executors.ranks import ranks_for
from luthier.training.worker.order import Desk, TrainEnd, TrainOrder
from luthier.work.child_watch import Overseer
from luthier.work.children import Calls, Children

STEP = "metrics"
"""The call that a training makes after each step."""
_CALLS = (
    "progress",
    "metrics",
    "measured",
    "log",
    "pausing",
    "run_record",
    "fetch",
    "fetch_into",
    "begin_checkpoint",
    "checkpoint_stored",
    "commit_rollouts",
    "scored",
)


class InChild:
    """Trains in a process of its own, one of `children`."""

    def __init__(self, children: Children) -> None:
        self._children = children

    def __call__(self, order: TrainOrder, desk: Desk, context: Overseer) -> TrainEnd:
        """Return what the process made.

        Raises:
            Unavailable: TOO_FEW_RANKS, the job takes more than one; CRASHED or STALLED.
            LuthierError: as `Children.run`.
        """
        ranks_for(order.task.train.job, 1)
        result: TrainEnd = self._children.run(order, calls_of(desk), context, STEP)
        return result


def calls_of(desk: Desk) -> Calls:
    """Return what a training may tell its driver and ask of it."""
    return {name: getattr(desk, name) for name in _CALLS}
