"""What children and ranks cost: a training in a child against the bare recipe, two ranks against one, a rank killed.

`python benchmarks/devices.py` trains a random model of its own, both sides of each comparison in turn, and ends with
one line of JSON, of medians over all rounds:

    child_step_ratio    seconds of a step in a child of the executor inline, as its driver hears them, by those of the
                        bare recipe in a process of its own; as many threads
    ranks2_vs_rank1     of two ranks of one thread each, by those of one rank of two threads; the same work
    rank_kill_seconds   from the SIGKILL of one of two ranks to the first step of the attempt after it, a tiny model,
                        the driver's part: without the queue between them, which takes milliseconds

It needs two processors, and nothing else that works on them. `--fast` is a smoke run.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import torch
from devices_work import LocalDesk, Size, Work

from luthier.errors import Unavailable
from luthier.training.executors.inline import InChild
from luthier.training.executors.pulse import shown
from luthier.training.executors.torchrun import Crew, Torchrun
from luthier.training.worker.order import Setup, TrainOrder
from luthier.work.children import Children, Program

SIZE = Size(width=512, layers=6, row_tokens=128, steps=12)
TINY = Size(width=64, layers=2, row_tokens=16, steps=200)
_SKIPPED_STEPS = 2
"""The first ones find kernels and threads cold."""
_numbers = count()


def children_of(threads: int) -> Children:
    """Return what starts children of so many threads, as a training worker does."""
    setup = Setup(device="cpu", num_threads=threads, log_level="WARNING")
    environment = {"OMP_NUM_THREADS": str(threads)}
    command = ("-P", "-m", "luthier.training.worker.child")
    return Children(Program(command=command, setup=setup, environment=environment))


def desk_of(work: Work, ranks: int = 1, checkpoint_interval: int = 1000) -> LocalDesk:
    """Return a desk with an order of its own."""
    scratch = work.folder / f"attempt-{next(_numbers)}"
    order = work.order(scratch, ranks, checkpoint_interval)
    return LocalDesk(work=work, order=order, kept=work.folder / f"{scratch.name}-kept")


def run(compute: Callable[[TrainOrder, Any, Any], Any], desk: LocalDesk) -> list[float]:
    """Train by an executor; returns the seconds of each step but the first."""
    compute(desk.order, desk, desk)
    return [after - before for before, after in pairwise(desk.step_times)]


def bare(work: Work, threads: int) -> list[float]:
    """Make the same steps by the recipe alone, in a process of its own."""
    torch.save(desk_of(work).order, work.folder / "order.pt")
    script = Path(__file__).with_name("devices_work.py")
    command = [sys.executable, str(script), str(work.folder), str(threads)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found: list[float] = json.loads(done.stdout.splitlines()[-1])
    return found


def ratio(
    left: Callable[[], Sequence[float]], right: Callable[[], Sequence[float]], rounds: int
) -> dict[str, float]:
    """Return the medians of both sides' steps, from rounds in which they take turns, and the left by the right."""
    found: tuple[list[float], list[float]] = ([], [])
    for turn in range(rounds):
        for side, measure in ((0, left), (1, right)) if turn % 2 == 0 else ((1, right), (0, left)):
            found[side].extend(measure()[_SKIPPED_STEPS:])
    medians = [statistics.median(one) for one in found]
    return {"left": medians[0], "right": medians[1], "ratio": medians[0] / medians[1]}


def kill_seconds(work: Work, children: Children) -> float:
    """Kill the second of two ranks after a checkpoint, and try again at once; returns the seconds to the next step."""
    executor = Torchrun(children, Crew(num_ranks=2, num_threads=1))
    desk = desk_of(work, ranks=2, checkpoint_interval=5)
    killed: list[float] = []

    def kill() -> None:
        while not desk.checkpoint_step:
            time.sleep(0.01)
        pulse = shown(desk.order.scratch / "meeting" / "pulse-1")
        assert pulse is not None, "a rank that stores a checkpoint shows a pulse"
        killed.append(time.perf_counter())
        os.kill(pulse.pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        executor(desk.order, desk, desk)  # type: ignore[arg-type]
    except Unavailable as error:
        print(f"lost: {error.message}", file=sys.stderr)
    killer.join()
    again = desk_of(work, ranks=2, checkpoint_interval=5)
    spec = again.order.task.train
    spec.checkpoint_files.extend(desk.checkpoint.values())
    spec.checkpoint_step = desk.checkpoint_step
    again.checkpoint, again.kept = dict(desk.checkpoint), desk.kept
    executor(again.order, again, again)  # type: ignore[arg-type]
    return again.step_times[0] - killed[0]


def measured(folder: Path, rounds: int, size: Size, tiny: Size) -> dict[str, Any]:
    """Return all figures."""
    work = Work(folder / "work", size)
    with children_of(2) as two, children_of(1) as one:
        for children in (one, two):
            children.require_ready()
        in_child: Any = InChild(two)
        on_two_ranks: Any = Torchrun(one, Crew(num_ranks=2, num_threads=1))
        child = ratio(lambda: run(in_child, desk_of(work)), lambda: bare(work, 2), rounds)
        ranks = ratio(
            lambda: run(on_two_ranks, desk_of(work, 2)), lambda: run(in_child, desk_of(work)), rounds
        )
        lives = Work(folder / "tiny", tiny)
        kills = [kill_seconds(lives, one) for _ in range(rounds)]
    return {"child": child, "ranks": ranks, "kills": kills}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--fast", action="store_true", help="a smoke run on tiny models")
    arguments = parser.parse_args()
    size = replace(TINY, steps=6) if arguments.fast else SIZE
    with tempfile.TemporaryDirectory() as folder:
        found = measured(Path(folder), 1 if arguments.fast else arguments.rounds, size, TINY)
    print(json.dumps(found, indent=1), file=sys.stderr)
    summary = {
        "child_step_ratio": round(found["child"]["ratio"], 3),
        "ranks2_vs_rank1": round(found["ranks"]["ratio"], 3),
        "rank_kill_seconds": round(statistics.median(found["kills"]), 2),
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
