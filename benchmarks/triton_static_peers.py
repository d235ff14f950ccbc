"""Compile our kernels and those of Liger and cut-cross-entropy ahead of time, and print what both take, side by side.

`python benchmarks/triton_static_peers.py` makes environments below build/environments with the peers and with each of
two versions of triton (see `triton_versions.py`), compiles in each for sm_80, sm_90, sm_100 and gfx942 with
`triton_static.py`'s own functions, prints a table with a line for each kernel of a peer, and writes
results/triton_static_peers.json: the rows of the newest triton, and the summaries of both. `--targets sm_90,gfx942`
compiles for some of them; then nothing is written. `--here` compiles in this very environment, which has the peers.
There is no gate: kernels that spill or do not compile are reported, and the exit code is 0.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from triton_static import TARGETS, Usage, compile_case
from triton_versions import run_each

if TYPE_CHECKING:
    from triton_static_cases import Case
    from triton_static_peer_cases import Comparison

RESULTS = Path(__file__).parent / "results" / "triton_static_peers.json"
PEERS = ("liger-kernel", "cut-cross-entropy")
# Their host code is called by name, so another version is another benchmark. Liger imports packaging, which its own
# requirements leave out.
REQUIREMENTS = ("liger-kernel==0.8.5", "cut-cross-entropy==25.1.1", "packaging")
_LONGEST_REASON = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    """What became of one kernel for a target: its usage, or why it does not compile.

    Attributes:
        name: of its case.
        num_warps: of a program; 0 where that is not known.
    """

    name: str
    target: str
    num_warps: int = 0
    usage: Usage | None = None
    failure: str = ""

    @property
    def remark(self) -> str:
        """Why it does not compile, or its problems; empty where there are none."""
        if self.usage is None:
            return f"does not compile: {self.failure}"
        return ", ".join(self.usage.problems)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A kernel of a peer beside ours, for the same target."""

    peer: str
    ours: Compiled
    theirs: Compiled


Task = tuple[str | int, str]
"""The name of a case of ours or the number of a comparison, as kernels cannot be sent to processes; and a target."""


def compile_task(task: Task) -> Compiled:
    """Compile a case of ours, or a peer's kernel of a comparison."""
    # Here, as importing the kernels settles whether they are interpreted or compiled.
    from triton_static_cases import cases
    from triton_static_peer_cases import peer_case

    which, target = task
    if isinstance(which, int):
        return compiled(peer_case(_comparisons()[which], target), target)
    return compiled(next(case for case in cases() if case.name == which), target)


def compiled(case: Case, target: str) -> Compiled:
    """Compile a case for a target; that a compiler refuses it is an outcome like another."""
    launch = case.launches.get(target, case.launches["*"])
    outcome = Compiled(name=case.name, target=target, num_warps=launch.num_warps)
    try:
        return replace(outcome, usage=compile_case(case, target))
    except Exception as error:  # Triton, MLIR and the assemblers each raise errors of their own.
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = f"{type(error).__name__}: {lines[-1] if lines else 'no reason given'}"
        return replace(outcome, failure=reason[:_LONGEST_REASON])


def compile_all(
    tasks: Sequence[Task], compile_one: Callable[[Task], Compiled] = compile_task
) -> dict[Task, Compiled]:
    """Compile in several processes; a compiler that ends its process is an outcome too."""
    found: dict[Task, Compiled] = {}
    with suppress(BrokenProcessPool), ProcessPoolExecutor() as pool:
        for task, outcome in zip(tasks, pool.map(compile_one, tasks), strict=True):
            found[task] = outcome
    # The pool ends with its process, so each that is left gets one of its own.
    for which, target in (task for task in tasks if task not in found):
        found[which, target] = Compiled(
            name=str(which), target=target, failure="the compiler ended its process"
        )
        with suppress(BrokenProcessPool), ProcessPoolExecutor(1) as pool:
            found[which, target] = pool.submit(compile_one, (which, target)).result()
    return found


@cache
def _comparisons() -> list[Comparison]:
    from triton_static_peer_cases import comparisons

    return list(comparisons())


COLUMNS: Mapping[str, str] = {
    "registers": "registers",
    "spilled_bytes": "spilled B",
    "shared_bytes": "shared B",
    "tensor_memory_columns": "tmem",
    "matrix_instructions": "mma",
}
"""What is printed of a usage, and the head of its column."""


def table(rows: Sequence[Row]) -> list[str]:
    """Lines with `ours | theirs` in each column; a dash stands for what is not compiled."""
    heads = ["target", "problem", "warps", *COLUMNS.values(), "their kernel", "verdict"]
    cells = [heads, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(heads))]
    return ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]


def _cells(row: Row) -> list[str]:
    sides = {"ours": row.ours, "theirs": row.theirs}
    pairs = [[side.num_warps or "-" for side in sides.values()]]
    for name in COLUMNS:
        pairs.append(["-" if side.usage is None else getattr(side.usage, name) for side in sides.values()])
    numbers = [f"{ours:>6} | {theirs}" for ours, theirs in pairs]
    kernel = row.theirs.usage.kernel if row.theirs.usage else row.peer
    remarks = [f"{name}: {remark}" for name, side in sides.items() if (remark := side.remark)]
    return [row.theirs.target, row.theirs.name, *numbers, kernel, "; ".join(remarks) or "ok"]


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """The keys of the last line: what is compared, and what of ours and of each peer spills or does not compile."""
    sides = {"ours": [row.ours for row in rows]}
    for peer in PEERS:
        sides[peer] = [row.theirs for row in rows if row.peer == peer]
    return {
        "comparisons": len(rows),
        "targets": sorted({row.theirs.target for row in rows}),
        **{name: _counts(side) for name, side in sides.items()},
    }


def _counts(side: Sequence[Compiled]) -> dict[str, int]:
    # One of ours stands beside several of theirs.
    outcomes = {(one.name, one.target): one.usage for one in side}.values()
    usages = [usage for usage in outcomes if usage]
    return {
        "compiled": len(usages),
        "not_compiled": len(outcomes) - len(usages),
        "spills": sum(usage.spilled_bytes > 0 for usage in usages),
        "over_limits": sum(any("must be" in problem for problem in usage.problems) for usage in usages),
    }


def compare(targets: Sequence[str]) -> list[Row]:
    """Compile both sides of every comparison."""
    # Fusing of multiply and add is set, as its default changes between versions of Triton.
    os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"
    os.environ.pop("TRITON_INTERPRET", None)
    work = [(number, one, target) for number, one in enumerate(_comparisons()) for target in targets]
    ours: list[Task] = [(one.ours, target) for _, one, target in work]
    theirs: list[Task] = [(number, target) for number, _, target in work]
    found = compile_all(list(dict.fromkeys([*ours, *theirs])))
    return [
        Row(
            peer=one.peer,
            ours=found[one.ours, target],
            theirs=replace(found[number, target], name=one.problem),
        )
        for number, one, target in work
    ]


def report(rows: Sequence[Row]) -> dict[str, Any]:
    """Print the table and one line of JSON; returns what is written."""
    print("\n".join(table(rows)))
    found = summary(rows)
    print(json.dumps(found))
    versions = {name: metadata.version(name) for name in ("torch", *PEERS)}
    return {
        "triton": metadata.version("triton"),
        "versions": versions,
        **found,
        "rows": [asdict(row) for row in rows],
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Compile here or in environments with the peers, print, write; returns the exit code."""
    parser = argparse.ArgumentParser(description="Compile our kernels and those of peers for real GPUs.")
    parser.add_argument("--targets", default=",".join(TARGETS), help="a few of them, by comma")
    parser.add_argument("--here", action="store_true", help="in this environment, which has the peers")
    parser.add_argument("--results", type=Path, help="the file to write, whatever the targets")
    arguments = parser.parse_args(argv)
    targets = arguments.targets.split(",")
    unknown = sorted(set(targets) - set(TARGETS))
    if unknown:
        parser.error(f"--targets must be of {', '.join(TARGETS)}, got {unknown[0]!r}")
    if arguments.here:
        code, results = 0, report(compare(targets))
    else:
        options = ["--here", "--targets", arguments.targets]
        code, results = run_each(Path(__file__), options, REQUIREMENTS)
    if arguments.results or set(targets) == set(TARGETS):
        (arguments.results or RESULTS).write_text(json.dumps(results, indent=1) + "\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
