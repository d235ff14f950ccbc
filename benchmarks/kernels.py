"""The kernels against eager torch and their peers, forward and backward, on shapes of real models.

`python benchmarks/kernels.py` writes results/kernels.json and results/kernels.svg, and ends with one line of JSON. With
`--write-tables` it also writes the tables that `impl="auto"` reads: a class of shapes takes ours only if ours won on
every shape of it. An instruction set below this processor's is timed in a process of its own in which torch, too, is
held to it, so that its table says what a processor of that kind would choose. `--isa` times one alone; its results go
to a file of its own, `results/kernels_<isa>.json`. `--op` times one operator alone, on all its shapes, and writes its
table and no results.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from kernel_cases import MODELS, SMALL, Case, Run, cases
from kernel_cases_decode import decode_cases
from kernel_cases_quantised import quantised_cases

from luthier.kernels.dispatch import Isa, available_isas, force_isa
from luthier.kernels.tables import OPS, table_path
from luthier.lm.memory import freed_memory_kept

RESULTS = Path(__file__).parent / "results"
WIN = 0.97  # a tie within the noise is no win
# Except where a whole training step was measured: with ours it was 9 % faster and held 370 MB less (decision 17).
WINS = {"lora_linear": 1.02}

# What holds torch and its libraries to an instruction set.
TORCH_HELD = {
    "plain": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "avx512": {"ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    # Torch asks the processor itself whether it has what a product needs; oneDNN, which makes it, asks this.
    "avx512_bf16": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
    "amx_bf16": {},
}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def timed(run: Run) -> float:
    """Seconds that one call takes."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def measure(case: Case, repeats: int, seconds: float, *, peers: bool) -> dict[str, float]:
    """Median seconds of each contender, the contenders taking turns; fewer rounds when they would take too long."""
    runs = {name: run for name, run in case.make().items() if peers or name in ("cpu", "eager")}
    # The first round compiles and warms caches up; it is not counted.
    first = sum(timed(run) for run in runs.values()) and sum(timed(run) for run in runs.values())
    rounds = max(3, min(repeats, int(seconds / max(first, 1e-6))))
    names = list(runs)
    counted = []
    for turn in range(rounds):
        # Another one begins each round: what a contender leaves behind (caches, freed memory) meets each of the others.
        start = turn % len(names)
        counted.append({name: timed(runs[name]) for name in names[start:] + names[:start]})
    return {name: statistics.median(one[name] for one in counted) for name in runs}


def isas_here() -> list[Isa]:
    """All that are timed on this processor where none is named, slowest first, by the names that the tables have.

    With tiles not `avx512_bf16`, unless it is named: how fast its kernels are here says little of a processor without,
    and is better than no entry.
    """
    return [isa for isa in available_isas() if isa != "avx512_bf16" or isa == available_isas()[-1]]


def measure_isa(isa: Isa, repeats: int, seconds: float, only: str, op: str = "") -> list[dict[str, Any]]:
    """Rows of results with one instruction set, in this process; of one operator, or of all."""
    force_isa(isa)
    is_best = isa == available_isas()[-1]
    rows = []
    problems = list(DTYPES.values()), MODELS if is_best else [SMALL]
    for case in chain(cases(*problems), decode_cases(*problems), quantised_cases(*problems)):
        if (op and op != case.op) or only not in f"{case.op} {case.name}":
            continue
        # Other models' shapes in float32 would say nothing new.
        if case.dtype == torch.float32 and not case.name.startswith((MODELS[0].name, SMALL.name)):
            continue
        medians = measure(case, repeats, seconds, peers=is_best)
        rows.append(
            {
                "op": case.op,
                "problem": case.name,
                "isa": isa,
                "dtype": str(case.dtype).removeprefix("torch."),
                "shape_class": case.shape_class,
                "headline": case.is_headline and is_best and case.dtype == torch.bfloat16,
                "median_seconds": medians,
            }
        )
        shown = "  ".join(f"{name} {1e3 * one:.2f} ms" for name, one in medians.items())
        print(f"{isa} {rows[-1]['dtype']} {case.name}: {shown}", file=sys.stderr, flush=True)
    return rows


def measure_in_child(isa: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of results with one instruction set, from a process in which torch is held to it."""
    command = [sys.executable, __file__, "--in-this-process", "--isa", isa, "--only", arguments.only]
    command += ["--op", arguments.op]
    command += ["--repeats", str(arguments.repeats), "--seconds", str(arguments.seconds)]
    environment = os.environ | TORCH_HELD[isa]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    rows: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return rows


def ratio(row: Mapping[str, Any], other: str = "eager") -> float:
    """Our time over another contender's."""
    seconds: Mapping[str, float] = row["median_seconds"]
    return seconds["cpu"] / seconds[other]


def write_tables(rows: Sequence[Mapping[str, Any]]) -> None:
    """Put what was measured into each operator's table; entries of other instruction sets and of GPUs stay."""
    for op in OPS:
        wins: dict[str, bool] = {}
        for row in rows:
            if row["op"] == op:
                name = f"{row['isa']}/{row['dtype']}/{row['shape_class']}"
                wins[name] = wins.get(name, True) and ratio(row) < WINS.get(op, WIN)
        table = {name: "cpu" if won else "eager" for name, won in wins.items()}
        if table:
            isas = {name.partition("/")[0] for name in table}
            before = json.loads(table_path(op).read_text())
            table |= {name: one for name, one in before.items() if name.partition("/")[0] not in isas}
            table_path(op).write_text(json.dumps(dict(sorted(table.items())), indent=2) + "\n")


def picture(rows: Sequence[Mapping[str, Any]]) -> str:
    """A bar for each problem: our time over eager's; the line at 1 is eager."""
    step, left, scale = 20, 470, 300
    parts = []
    for index, row in enumerate(rows):
        y, value = 40 + index * step, ratio(row)
        width = min(value, 1.4) * scale
        colour = "#2f7d4f" if value < 1 else "#b4452f"
        label = f"{row['op']}: {row['problem']} ({row['dtype']})"
        parts.append(f'<text x="{left - 8}" y="{y + 11}" text-anchor="end">{label}</text>')
        parts.append(f'<rect x="{left}" y="{y}" width="{width:.1f}" height="14" fill="{colour}"/>')
        parts.append(f'<text x="{left + width + 6:.1f}" y="{y + 11}">{value:.2f}</text>')
    height = 60 + len(rows) * step
    line = f'<line x1="{left + scale}" y1="30" x2="{left + scale}" y2="{height - 14}" stroke="#555"/>'
    title = '<text x="20" y="20" font-weight="bold">Forward + backward: our time over eager torch</text>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="960" height="{height}" font-family="sans-serif" '
        f'font-size="11"><rect width="100%" height="100%" fill="white"/>{title}{line}{"".join(parts)}</svg>\n'
    )


def summary_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The figures that releases are compared by; None where the problem was not measured."""
    headlines = {row["op"]: row for row in rows if row["headline"]}

    def against(op: str, other: str) -> float | None:
        return round(ratio(headlines[op], other), 3) if op in headlines else None

    return {
        "linear_cross_entropy_vs_eager": against("linear_cross_entropy", "eager"),
        "lora_linear_vs_frozen": against("lora_linear", "bare frozen linear"),
        "attention_varlen_vs_sdpa": against("attention_varlen", "eager"),
        "grouped_64_vs_1": against("grouped_lora_linear", "one adapter"),
        "slower_than_eager": [
            f"{row['op']}, {row['problem']}, {row['isa']} {row['dtype']}" for row in rows if ratio(row) > 1
        ],
    }


def main() -> int:
    """Measure, write the results, print the summary."""
    parser = argparse.ArgumentParser(description="Time the kernels.")
    parser.add_argument("--repeats", type=int, default=15, help="most counted rounds of a problem")
    parser.add_argument(
        "--seconds", type=float, default=6.0, help="about so long for a problem, three rounds at least"
    )
    parser.add_argument("--only", default="", help="only problems whose operator and name contain this")
    parser.add_argument("--op", choices=("", *OPS), default="", help="only this operator")
    parser.add_argument("--write-tables", action="store_true", help="also write the tables that `auto` reads")
    parser.add_argument("--isa", choices=available_isas(), help="only this instruction set (default: all)")
    parser.add_argument("--in-this-process", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.in_this_process:
        # As in a worker that trains.
        with freed_memory_kept():
            rows = measure_isa(
                arguments.isa, arguments.repeats, arguments.seconds, arguments.only, arguments.op
            )
        print(json.dumps(rows))
        return 0
    isas = [arguments.isa] if arguments.isa else isas_here()
    rows = [row for isa in reversed(isas) for row in measure_in_child(isa, arguments)]
    if arguments.write_tables:
        write_tables(rows)
    summary = summary_of(rows)
    machine = {
        "processor": torch.cpu.get_capabilities().get("cpu_name", platform.machine()),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    document = {"machine": machine, "isas": isas, "rows": rows, **summary}
    if not arguments.only and not arguments.op:
        RESULTS.mkdir(exist_ok=True)
        name = f"kernels_{arguments.isa}" if arguments.isa else "kernels"
        (RESULTS / f"{name}.json").write_text(json.dumps(document, indent=2) + "\n")
        (RESULTS / f"{name}.svg").write_text(picture([row for row in rows if row["isa"] == isas[-1]]))
    print(json.dumps(summary))
    return 0


if __name__ == "__main__":
    sys.exit(main())
