"""How `gpu.py` judges and times: each contender against float32 first, then all in turns, by the device's clock."""

from __future__ import annotations

import gc
import importlib.util
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

OURS = "ours"
EAGER = "eager"
"""The contender whose own error says how far another one may be off."""
# More than any level-2 cache, and than the 256 MB that lie behind that of an MI300.
_FLUSH_BYTES = 512 << 20
_WARM_UPS = 3
# A run that takes less is timed several at a time, as training calls it: the host goes ahead of the device.
_SHORT_MILLISECONDS = 20.0
_CALLS = 4
# More than the clock of any GPU makes in a millisecond.
_CYCLES_OF_MILLISECOND = 2_000_000
_SHOWN_CHARACTERS = 300

Outcome = dict[str, Any]
"""What became of a contender: `status` is timed, wrong, refused, failed or missing; `why` where it is not timed."""


class DeviceLostError(RuntimeError):
    """A contender left the device unusable for this process."""


@dataclass(frozen=True, slots=True)
class Program:
    """A contender that is ready: what it computes, what is timed of it, and what comes before each timed run."""

    results: Callable[[], list[Tensor]]
    run: Callable[[], object]
    restore: Callable[[], None]


@dataclass(frozen=True, slots=True)
class Contender:
    """How to make a contender ready, and the packages that this takes: import name -> what pip calls it."""

    make: Callable[[], Program]
    packages: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One thing to compute, by its contenders; EAGER is one of them.

    Attributes:
        reference: the computation in float32.
        dtype: what the contenders round to.
        operations: of products that one run has to make, whoever makes it; 0: not counted.
    """

    dtype: torch.dtype
    reference: Callable[[], Program]
    contenders: Mapping[str, Contender]
    operations: int = 0


class Clock(Protocol):
    """Times programs on a device."""

    warm_ups: int

    def milliseconds(self, program: Program, calls: int = 1) -> float:
        """What one run takes of so many that follow each other: of host and device, the slower."""

    def device_milliseconds(self, program: Program, longest: float) -> float | None:
        """What one run takes of the device, where the host needs at most so long; None where there is none."""

    def peak_bytes(self, program: Program) -> int | None:
        """Most memory that one run takes beyond what was held before it; None where nobody counts."""

    def check_alive(self) -> None:
        """Raise DeviceLostError where nothing runs any more."""


class DeviceClock:
    """CUDA or ROCm: events around a run whose operands are in no cache."""

    warm_ups = _WARM_UPS

    def __init__(self) -> None:
        self._flushed = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device="cuda")

    def milliseconds(self, program: Program, calls: int = 1) -> float:
        """What one run takes of so many that follow each other: of host and device, the slower."""
        program.restore()
        self._flushed.zero_()
        torch.cuda.synchronize()
        return self._between(program, calls)

    def device_milliseconds(self, program: Program, longest: float) -> float | None:
        """What one run takes of the device, which waits until the host has enqueued all of it."""
        program.restore()
        self._flushed.zero_()
        torch.cuda._sleep(int((longest + 1) * _CYCLES_OF_MILLISECOND))  # type: ignore[no-untyped-call]
        return self._between(program, 1)

    def _between(self, program: Program, calls: int) -> float:
        begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        begin.record()
        for _ in range(calls):
            program.run()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / calls

    def peak_bytes(self, program: Program) -> int | None:
        """Most memory that one run takes beyond what was held before it."""
        program.restore()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        program.run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - held

    def check_alive(self) -> None:
        """Raise DeviceLostError where nothing runs any more."""
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            raise DeviceLostError(str(error).splitlines()[0]) from error


class HostClock:
    """The processor's clock, for a dry run: its figures mean nothing, so it runs each program once."""

    warm_ups = 0

    def __init__(self) -> None:
        self._known: dict[Program, float] = {}

    def milliseconds(self, program: Program, calls: int = 1) -> float:  # noqa: ARG002 - the protocol's
        """What its one run took."""
        if program not in self._known:
            program.restore()
            began = time.perf_counter()
            program.run()
            self._known[program] = 1e3 * (time.perf_counter() - began)
        return self._known[program]

    def device_milliseconds(self, program: Program, longest: float) -> float | None:  # noqa: ARG002 - the protocol's
        """There is no device."""
        return None

    def peak_bytes(self, program: Program) -> int | None:  # noqa: ARG002 - the protocol's
        """Nobody counts."""
        return None

    def check_alive(self) -> None:
        """It is."""


def errors(got: Sequence[Tensor], want: Sequence[Tensor]) -> list[float]:
    """How far each result is off, relative to the norm of what is wanted; nan where it is no number.

    Raises:
        ValueError: there are other results than wanted, or of other shapes.
    """
    shapes = [[tuple(one.shape) for one in side] for side in (got, want)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"results must have the shapes {shapes[1]}, got {shapes[0]}")
    found = []
    for one, exact in zip(got, want, strict=True):
        scale = torch.linalg.vector_norm(exact, dtype=torch.float64).item()
        distance = torch.linalg.vector_norm(one.float() - exact, dtype=torch.float64).item()
        found.append(distance / scale if scale else distance)
    return found


def allowed_errors(eager: Sequence[float], dtype: torch.dtype) -> list[float]:
    """Twice what plain torch is off at that dtype, and one rounding."""
    return [2 * error + torch.finfo(dtype).eps / 2 for error in eager]


def judged(off: Sequence[float], allowed: Sequence[float]) -> Outcome:
    """The outcome of a contender that is so far off: `wrong`, or `timed` for one that may be timed."""
    margins = [error / limit for error, limit in zip(off, allowed, strict=True)]
    # A nan is worse than any number.
    worst = max(range(len(off)), key=lambda index: (margins[index] != margins[index], margins[index]))
    # JSON has no nan.
    error = off[worst] if math.isfinite(off[worst]) else None
    outcome: Outcome = {"status": "timed", "error": error, "allowed_error": allowed[worst]}
    if not margins[worst] <= 1:
        why = f"result {worst} is {off[worst]:.2e} off, allowed are {allowed[worst]:.2e}"
        outcome |= {"status": "wrong", "why": why}
    return outcome


def measure(problem: Problem, clock: Clock, repeats: int) -> dict[str, Outcome]:
    """Every contender's outcome.

    Where it is timed, with medians of `milliseconds` and, of short runs, `device_milliseconds`, and with
    `fastest_milliseconds` and `peak_bytes`.

    Raises:
        DeviceLostError: a contender left the device unusable.
    """
    _begin_anew()
    outcomes: dict[str, Outcome] = {}
    for name, contender in problem.contenders.items():
        if lacking := missing(contender):
            outcomes[name] = {"status": "missing", "why": f"not installed: {', '.join(lacking)}"}
    present = {name: one for name, one in problem.contenders.items() if name not in outcomes}
    programs: dict[str, Program] = {}
    try:
        want = [one.float() for one in problem.reference().results()]
        allowed = allowed_errors(errors(present[EAGER].make().results(), want), problem.dtype)
    except Exception as error:
        clock.check_alive()
        why = f"nothing to compare with: {shown(error)}"
        outcomes |= {name: {"status": "failed", "why": why} for name in present}
        present = {}
    for name, contender in present.items():
        program, outcomes[name] = _tried(name, contender, (want, allowed), clock)
        if program is not None:
            programs[name] = program
    try:
        figures = _timed(programs, clock, repeats)
    except Exception as error:
        clock.check_alive()
        why = f"while all took turns: {shown(error)}"
        figures = {name: {"status": "failed", "why": why} for name in programs}
    for name in programs:
        outcomes[name] |= figures[name]
    return {name: outcomes[name] for name in problem.contenders}


def _begin_anew() -> None:
    # Graphs are kept by a function's code, which the problems share: after a few shapes torch would compile no more.
    torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()


def shown(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {error}".replace("\n", " ")[:_SHOWN_CHARACTERS]


def missing(contender: Contender) -> list[str]:
    """The packages that a contender lacks, as pip calls them."""
    return [pip for name, pip in contender.packages.items() if importlib.util.find_spec(name) is None]


def _tried(
    name: str, contender: Contender, expected: tuple[list[Tensor], list[float]], clock: Clock
) -> tuple[Program | None, Outcome]:
    want, allowed = expected
    try:
        program = contender.make()
        outcome = judged(errors(program.results(), want), allowed)
        for _ in range(clock.warm_ups if outcome["status"] == "timed" else 0):
            clock.milliseconds(program)
    # Foreign code fails with whatever it likes, and its peers are to be measured all the same.
    except Exception as error:
        clock.check_alive()
        refused = name == OURS and isinstance(error, ValueError)
        return None, {"status": "refused" if refused else "failed", "why": shown(error)}
    return (program if outcome["status"] == "timed" else None), outcome


def _timed(programs: Mapping[str, Program], clock: Clock, repeats: int) -> dict[str, Outcome]:
    names = list(programs)
    once = {name: clock.milliseconds(programs[name]) for name in names}
    # All the same way: the longest decides.
    is_short = max(once.values(), default=0.0) < _SHORT_MILLISECONDS
    taken: dict[str, list[float]] = {name: [] for name in names}
    on_device: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(repeats if names else 0):
        # Another one begins each round: what a contender leaves behind meets each of the others.
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            taken[name].append(clock.milliseconds(programs[name], _CALLS if is_short else 1))
            alone = clock.device_milliseconds(programs[name], once[name]) if is_short else None
            on_device[name] += [] if alone is None else [alone]
    return {
        name: {
            "milliseconds": statistics.median(taken[name]),
            "fastest_milliseconds": min(taken[name]),
            "device_milliseconds": statistics.median(on_device[name]) if on_device[name] else None,
            "peak_bytes": clock.peak_bytes(programs[name]),
        }
        for name in names
    }
