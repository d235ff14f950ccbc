"""A training in a child against the bare recipe, two ranks against one, a rank killed. For `devices.py`."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, count, pairwise
from pathlib import Path
from typing import Any

import torch
from devices_work import LocalDesk, Size, Work

from luthier.errors import Unavailable
from luthier.training.executors.inline import InChild
from luthier.training.executors.pulse import shown
from luthier.training.executors.ranks import pulse_path
from luthier.training.executors.torchrun import Crew, Torchrun
from luthier.work.children import Children, Program
from luthier.work.device import Setup

SIZE = Size(width=512, layers=6, row_tokens=128, steps=12)
TINY = Size(width=64, layers=2, row_tokens=16, steps=200)
_FAST = replace(TINY, steps=6)
_SKIPPED_STEPS = 2
"""The first ones find kernels and threads cold."""
_CHECKPOINT_SECONDS = 120.0
"""To the first checkpoint of a tiny model."""
_numbers = count()


@contextmanager
def children_of(threads: int) -> Iterator[Children]:
    """Yield what starts children of so many threads, as a training worker does, once one is ready."""
    setup = Setup(device="cpu", num_threads=threads, log_level="WARNING")
    environment = {"OMP_NUM_THREADS": str(threads)}
    command = ("-P", "-m", "luthier.training.worker.child")
    with Children(Program(command=command, setup=setup, environment=environment)) as children:
        children.require_ready()
        yield children


def desk_of(work: Work, ranks: int = 1, checkpoint_interval: int = 1000) -> LocalDesk:
    """Return a desk with an order of its own."""
    scratch = work.folder / f"attempt-{next(_numbers)}"
    order = work.order(scratch, ranks, checkpoint_interval)
    return LocalDesk(work=work, order=order, kept=work.folder / f"{scratch.name}-kept")


def run(executor: InChild | Torchrun, desk: LocalDesk) -> list[float]:
    """Train by an executor; returns the seconds of each step but the first."""
    executor(desk.order, desk, desk)
    return [after - before for before, after in pairwise(desk.step_times)]


def bare(work: Work, threads: int) -> list[float]:
    """Make the same steps by the recipe alone, in a process of its own."""
    torch.save(desk_of(work).order, work.folder / "order.pt")
    script = Path(__file__).with_name("devices_work.py")
    command = [sys.executable, str(script), str(work.folder), str(threads)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the bare recipe ended with {done.returncode}: {done.stderr[-2000:]}")
    found: list[float] = json.loads(done.stdout.splitlines()[-1])
    return found


def ratio(
    left: Callable[[], Sequence[float]], right: Callable[[], Sequence[float]], rounds: int
) -> dict[str, Any]:
    """Return the medians of both sides' steps, from rounds in which they take turns, and the left by the right.

    `by_round` are the ratios of the rounds' own medians: how far they are apart is how sure the figure is.
    """
    found: tuple[list[Sequence[float]], list[Sequence[float]]] = ([], [])
    for turn in range(rounds):
        for side, measure in ((0, left), (1, right)) if turn % 2 == 0 else ((1, right), (0, left)):
            found[side].append(measure()[_SKIPPED_STEPS:])
    medians = [statistics.median(chain.from_iterable(side)) for side in found]
    by_round = [statistics.median(one) / statistics.median(other) for one, other in zip(*found, strict=True)]
    return {"left": medians[0], "right": medians[1], "ratio": medians[0] / medians[1], "by_round": by_round}


def child_cost(folder: Path, rounds: int, *, is_fast: bool) -> dict[str, Any]:
    """Return the seconds of a step in a child, by those of the bare recipe."""
    work = Work(folder / "work", _FAST if is_fast else SIZE)
    with children_of(2) as two:
        executor = InChild(two)
        return ratio(lambda: run(executor, desk_of(work)), lambda: bare(work, 2), rounds)


def ranks_cost(folder: Path, rounds: int, *, is_fast: bool) -> dict[str, Any]:
    """Return the seconds of a step on two ranks of one thread each, by those on one of two threads."""
    work = Work(folder / "work", _FAST if is_fast else SIZE)
    with children_of(2) as two, children_of(1) as one:
        alone, both = InChild(two), Torchrun(one, Crew(num_ranks=2, num_threads=1))
        return ratio(lambda: run(both, desk_of(work, 2)), lambda: run(alone, desk_of(work)), rounds)


def kill_cost(folder: Path, rounds: int, *, is_fast: bool) -> dict[str, Any]:
    """Return the seconds from the kill of a rank to the next attempt's first step, the median of all rounds."""
    work = Work(folder / "work", replace(TINY, steps=60) if is_fast else TINY)
    with children_of(1) as children:
        kills = [kill_seconds(work, children) for _ in range(rounds)]
    return {"seconds": statistics.median(kills), "by_round": kills}


def kill_seconds(work: Work, children: Children) -> float:
    """Kill the second of two ranks after a checkpoint, and try again at once; returns the seconds to the next step.

    Raises:
        RuntimeError: the training came to its end, and no rank was lost.
    """
    executor = Torchrun(children, Crew(num_ranks=2, num_threads=1))
    desk = desk_of(work, ranks=2, checkpoint_interval=5)
    killed: list[float] = []
    killer = threading.Thread(target=_kill_second, args=(desk, killed))
    killer.start()
    try:
        executor(desk.order, desk, desk)
    except Unavailable as error:
        print(f"lost: {error.message}", file=sys.stderr)
    else:
        raise RuntimeError(f"a training must lose its killed rank, it made {len(desk.step_times)} steps")
    finally:
        killer.join()
    again = desk_of(work, ranks=2, checkpoint_interval=5)
    spec = again.order.task.train
    spec.checkpoint_files.extend(desk.checkpoint.values())
    spec.checkpoint_step = desk.checkpoint_step
    again.checkpoint, again.kept = dict(desk.checkpoint), desk.kept
    executor(again.order, again, again)
    return again.step_times[0] - killed[0]


def _kill_second(desk: LocalDesk, killed: list[float]) -> None:
    """Kill the second rank once there is a checkpoint; notes when."""
    until = time.monotonic() + _CHECKPOINT_SECONDS
    while not desk.checkpoint_step and time.monotonic() < until:
        time.sleep(0.01)
    pulse = shown(pulse_path(desk.order.scratch / "meeting", 1))
    assert pulse is not None, "a rank that stores a checkpoint shows a pulse"
    killed.append(time.perf_counter())
    os.kill(pulse.pid, signal.SIGKILL)
