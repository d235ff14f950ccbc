"""A training in a child against the bare recipe, two ranks against one, a rank killed. For `devices.py`."""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, count
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from devices_turns import Side, take_turns
from devices_work import LocalDesk, Size, Work

from luthier.errors import Unavailable
from luthier.training.executors.inline import InChild
from luthier.training.executors.pulse import shown
from luthier.training.executors.ranks import pulse_path
from luthier.training.executors.torchrun import Crew, Torchrun
from luthier.training.executors.vigil import Bounds
from luthier.work.children import Children, Program
from luthier.work.device import Setup

SIZE = Size(width=512, layers=6, row_tokens=128, steps=32)
TINY = Size(width=64, layers=2, row_tokens=16, steps=200)
_FAST = replace(TINY, steps=12)
_PATIENT = Bounds(still_seconds=120.0, asleep_seconds=120.0, apart_seconds=120.0)
"""For ranks that are stopped while another training has its turn."""
_CHECKPOINT_SECONDS = 120.0
"""To the first checkpoint of a tiny model."""
_numbers = count()


@contextmanager
def children_of(threads: int, environment: Mapping[str, str] = MappingProxyType({})) -> Iterator[Children]:
    """Yield what starts children of so many threads, as a training worker does, once one is ready."""
    setup = Setup(device="cpu", num_threads=threads, log_level="WARNING")
    command = ("-P", "-m", "luthier.training.worker.child")
    program = Program(
        command=command, setup=setup, environment={"OMP_NUM_THREADS": str(threads), **environment}
    )
    with Children(program) as children:
        children.require_ready()
        yield children


def desk_of(
    work: Work, ranks: int = 1, checkpoint_interval: int = 1000, heard: Callable[[], None] = lambda: None
) -> LocalDesk:
    """Return a desk with an order of its own, which calls `heard` whenever a step has ended."""
    scratch = work.folder / f"attempt-{next(_numbers)}"
    order = work.order(scratch, ranks, checkpoint_interval)
    return LocalDesk(work=work, order=order, kept=work.folder / f"{scratch.name}-kept", heard=heard)


def trained_side(name: str, work: Work, threads: int, num_ranks: int = 1) -> Side:
    """Return a training in a child of so many threads, by the executor inline, or on several by torchrun's."""

    def run(heard: Callable[[], None]) -> None:
        with children_of(threads, side.environment) as children:
            desk = desk_of(work, num_ranks, heard=heard)
            crew = Crew(num_ranks=num_ranks, num_threads=threads, bounds=_PATIENT)
            executor = InChild(children) if num_ranks == 1 else Torchrun(children, crew)
            executor(desk.order, desk, desk)

    side = Side(name=name, run=run)
    return side


def bare_side(name: str, work: Work, threads: int) -> Side:
    """Return the same steps by the recipe alone, in a process of its own."""

    def run(heard: Callable[[], None]) -> None:
        torch.save(desk_of(work).order, work.folder / "order.pt")
        script = Path(__file__).with_name("devices_work.py")
        command = [sys.executable, str(script), str(work.folder), str(threads)]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), **side.environment}
        errors = work.folder / "bare.log"
        with (
            errors.open("wb") as log,
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=log) as process,
        ):
            assert process.stdout is not None
            for _ in process.stdout:
                heard()
        if process.returncode:
            said = errors.read_text(encoding="utf-8", errors="replace")[-2000:]
            raise RuntimeError(f"the bare recipe ended with {process.returncode}: {said}")

    side = Side(name=name, run=run)
    return side


def ratio(left: Callable[[], Side], right: Callable[[], Side], rounds: int) -> dict[str, Any]:
    """Return the medians of both sides' steps, and the left by the right.

    In each round both are begun anew and take turns. `ratio` is the median, over all turns, of a step of the left by
    that of the right beside it; `quartiles` are of these, `by_round` the medians of each round: how far they are apart
    is how sure the figure is.
    """
    steps: tuple[list[float], list[float]] = ([], [])
    by_round: list[list[float]] = []
    for turn in range(rounds):
        sides = (left(), right())
        take_turns(*(sides if turn % 2 == 0 else sides[::-1]))
        for found, side in zip(steps, sides, strict=True):
            found.extend(side.seconds)
        pairs = zip(sides[0].seconds, sides[1].seconds, strict=True)
        by_round.append([one / other for one, other in pairs])
    ratios = list(chain.from_iterable(by_round))
    return {
        "left": statistics.median(steps[0]),
        "right": statistics.median(steps[1]),
        "ratio": statistics.median(ratios),
        "quartiles": statistics.quantiles(ratios, n=4, method="inclusive")[::2],
        "by_round": [statistics.median(one) for one in by_round],
    }


def child_cost(folder: Path, rounds: int, *, is_fast: bool) -> dict[str, Any]:
    """Return the seconds of a step in a child, by those of the bare recipe."""
    work = Work(folder / "work", _FAST if is_fast else SIZE)
    return ratio(lambda: trained_side("child", work, 2), lambda: bare_side("bare", work, 2), rounds)


def ranks_cost(folder: Path, rounds: int, *, is_fast: bool) -> dict[str, Any]:
    """Return the seconds of a step on two ranks of one thread each, by those on one of two threads."""
    work = Work(folder / "work", _FAST if is_fast else SIZE)
    return ratio(
        lambda: trained_side("two", work, 1, num_ranks=2), lambda: trained_side("one", work, 2), rounds
    )


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
