"""The process of a training whose rank goes wrong as the job's id says, `deadlocks-1`, in its first attempt.

It is a program of its own: what is changed in the tests' process is not changed in those that compute.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from luthier.training.executors.ranks import RankOrder
from luthier.training.worker import child
from luthier.work.child import Line, Work, serve
from luthier.work.device import Setup

_MEETING = 6
"""Sums of gradients that come before: a checkpoint is there."""
KILLS = "LUTHIER_TEST_KILLS"
_fault: list[Callable[[], None]] = []


def deadlocks() -> None:
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


def spins() -> None:
    while True:
        pass


def is_short() -> None:
    raise MemoryError


def vanishes() -> None:
    """Others see at once that it is gone, and whoever waits for its end sees it a moment later.

    The kernel has counted the kill by then: a byte in the file that KILLS names.
    """
    with Path(os.environ[KILLS]).open("ab") as kills:
        kills.write(b"k")
    subprocess.Popen(["sh", "-c", f"sleep 0.3; kill -KILL {os.getpid()}"], start_new_session=True)
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError), socket.socket(fileno=os.dup(int(name))) as own:
            if own.family == socket.AF_INET:
                own.shutdown(socket.SHUT_WR)
    # It would end itself when it sees that the others have ended.
    os.kill(os.getpid(), signal.SIGSTOP)


FAULTS = {"deadlocks": deadlocks, "spins": spins, "short": is_short, "vanishes": vanishes}


def begin(setup: Setup) -> None:
    """Begin as any, and go wrong where it is told to."""
    child.begin(setup)
    from luthier.training.recipes.process_group import Replicas
    from luthier.training.worker import trial

    ranks_of_any, trial_of_any = cast(Any, Replicas), cast(Any, trial)
    summed, tried = ranks_of_any.sum_gradients, trial_of_any.try_pass
    met: list[None] = []

    def sum_gradients(ranks: Replicas, gradients: Sequence[Any]) -> None:
        met.append(None)
        if _fault and len(met) > _MEETING:
            _fault[0]()
        summed(ranks, gradients)

    def try_pass(*arguments: Any) -> None:
        if _fault == [is_short]:
            is_short()
        tried(*arguments)

    ranks_of_any.sum_gradients = sum_gradients
    trial_of_any.try_pass = try_pass


def prepare(setup: Setup) -> Work:
    """Return what does an order, as any, and hears which fault is its own."""
    does = child.prepare(setup)

    def work(line: Line, order: Any) -> Any:
        if isinstance(order, RankOrder):
            fault, _, rank = order.order.task.train.job.name.rpartition("/")[2].partition("-")
            if fault in FAULTS and order.rank == int(rank) and order.order.task.attempt == 1:
                _fault.append(FAULTS[fault])
        return does(line, order)

    return work


if __name__ == "__main__":
    serve(prepare, begin)
