"""What issue 17's promises cost on this machine: children, ranks, checkpoints, quantised bases, and how plans hold.

`python benchmarks/devices.py` measures part by part, both sides of each comparison in turn, and ends with one line of
JSON, of medians over all rounds:

    child_step_ratio        seconds of a step in a child of the executor inline, as its driver hears them, by those of
                            the bare recipe in a process of its own; as many threads; both take turns step by step
    ranks2_vs_rank1         of two ranks of one thread each, by those of one rank of two threads; the same, in turns
    rank_kill_seconds       from the SIGKILL of one of two ranks to the first step of the attempt after it, a tiny
                            model, the driver's part: without the queue between them, which takes milliseconds
    checkpoint_stall_steps  how much longer the step behind a checkpoint of 500 MB takes, in steps (`devices_stall.py`)
    int8_bytes_ratio,       bytes of base weights by those in bfloat16 (`devices_bytes.py`)
    nf4_bytes_ratio
    plan_memory_error       the largest of what a plan is off by, over all configurations of `calibration.py`
    plan_time_error         the same of a step's time, by the rates that each process reached just before; of each
                            configuration in the round that is its median
    plan_told_time_error    the same of the time that a plan tells, by the rates that it has of the instruction set

What was not asked for is null there. All details, the machine and its load (`/proc/loadavg`
around each part) go to `results/devices.json` once all parts were asked for. It needs two processors, and nothing else
that works on them. `--only child,ranks` measures some parts. `--fast` is a smoke run on tiny models, whose figures mean
nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import devices_bytes
import devices_plan
import devices_ranks
import devices_stall
import torch

from luthier.kernels.dispatch import current_isa
from luthier.work.machine import memory_bytes, num_cores, processor_name

RESULTS = Path(__file__).parent / "results" / "devices.json"
Found = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What a run measures: in a folder that is its own, so many rounds; `is_fast`: on tiny models."""

    folder: Path
    rounds: int
    is_fast: bool


def _child(asked: Asked) -> Found:
    return devices_ranks.child_cost(asked.folder, asked.rounds, is_fast=asked.is_fast)


def _ranks(asked: Asked) -> Found:
    return devices_ranks.ranks_cost(asked.folder, asked.rounds, is_fast=asked.is_fast)


def _kill(asked: Asked) -> Found:
    return devices_ranks.kill_cost(asked.folder, asked.rounds, is_fast=asked.is_fast)


def _stall(asked: Asked) -> Found:
    size = devices_stall.FAST if asked.is_fast else devices_stall.SIZE
    return devices_stall.measured(asked.folder, size)


def _bytes(asked: Asked) -> Found:
    return devices_bytes.measured(asked.folder, is_fast=asked.is_fast)


def _plan(asked: Asked) -> Found:
    return devices_plan.measured(asked.folder, asked.rounds, is_fast=asked.is_fast)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A part of the benchmark; `keys` are the figures that it gives, by what they are in its details."""

    measure: Callable[[Asked], Found]
    keys: Mapping[str, str]


PARTS: Mapping[str, Part] = {
    "child": Part(measure=_child, keys={"child_step_ratio": "ratio"}),
    "ranks": Part(measure=_ranks, keys={"ranks2_vs_rank1": "ratio"}),
    "kill": Part(measure=_kill, keys={"rank_kill_seconds": "seconds"}),
    "stall": Part(measure=_stall, keys={"checkpoint_stall_steps": "stall_steps"}),
    "bytes": Part(
        measure=_bytes,
        keys={"int8_bytes_ratio": "int8_bytes_ratio", "nf4_bytes_ratio": "nf4_bytes_ratio"},
    ),
    "plan": Part(
        measure=_plan,
        keys={
            "plan_memory_error": "plan_memory_error",
            "plan_time_error": "plan_time_error",
            "plan_told_time_error": "plan_told_time_error",
        },
    ),
}


def load_average() -> list[float]:
    """Return how many processes wanted a processor in the last minute, 5 and 15 minutes."""
    return [float(word) for word in Path("/proc/loadavg").read_text(encoding="ascii").split()[:3]]


def measured(asked: Asked, names: Sequence[str]) -> dict[str, Found]:
    """Measure some parts; one that fails is an error."""
    found: dict[str, Found] = {}
    for name in names:
        folder = asked.folder / name
        folder.mkdir()
        before, began = load_average(), time.monotonic()
        part = PARTS[name].measure(Asked(folder=folder, rounds=asked.rounds, is_fast=asked.is_fast))
        around = {"load_before": before, "load_after": load_average()}
        found[name] = {**part, **around, "took_seconds": round(time.monotonic() - began, 1)}
        print(json.dumps({name: found[name]}), file=sys.stderr, flush=True)
    return found


def summary_of(found: Mapping[str, Found]) -> dict[str, Any]:
    """Return all figures; null is what was not asked for."""
    return {
        key: round(found[name][detail], 3) if name in found else None
        for name, part in PARTS.items()
        for key, detail in part.keys.items()
    }


def machine() -> dict[str, Any]:
    """Return what the figures are true for."""
    return {
        "processor": processor_name(),
        "instruction_set": current_isa(),
        "cores": num_cores(),
        "memory_bytes": memory_bytes(),
        "torch": torch.__version__,
        "load": load_average(),
    }


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; `parts` becomes the names of parts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--rounds", type=int, default=3, help="in which both sides take a turn (default 3)")
    parser.add_argument("--only", default=",".join(PARTS), metavar="A,B", help=f"some of {', '.join(PARTS)}")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FILE", help="the file to write")
    parser.add_argument("--fast", action="store_true", help="a smoke run on tiny models; writes no file")
    arguments = parser.parse_args(argv)
    arguments.parts = arguments.only.split(",")
    if unknown := [name for name in arguments.parts if name not in PARTS]:
        parser.error(f"--only must be of {', '.join(PARTS)}, got {', '.join(map(repr, unknown))}")
    if arguments.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {arguments.rounds}")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, write the details, print the figures."""
    arguments = parse(argv)
    is_fast: bool = arguments.fast
    around = machine()
    with tempfile.TemporaryDirectory() as folder:
        asked = Asked(folder=Path(folder), rounds=1 if is_fast else arguments.rounds, is_fast=is_fast)
        found = measured(asked, arguments.parts)
    summary = summary_of(found)
    if not is_fast and set(arguments.parts) == set(PARTS):
        document = {"machine": around, "rounds": asked.rounds, "parts": found, **summary}
        arguments.results.write_text(json.dumps(document, indent=2) + "\n")
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
