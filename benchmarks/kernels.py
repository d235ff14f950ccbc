"""Time the kernels against what people use: contenders interleaved, several repeats, medians and ratios.

    python benchmarks/kernels.py [--repeats N] [--write-table]

Writes benchmarks/results/kernels.json and kernels.svg; the last line of output is one line of JSON. `--write-table`
also writes the table beside each op that its `auto` reads: the implementation that was faster.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from luthier.kernels.dispatch import Isa, available_isas, current_isa, force_isa
from luthier.kernels.linear_cross_entropy import linear_cross_entropy
from luthier.kernels.linear_cross_entropy.table import TABLE_PATH, key

RESULTS = Path(__file__).parent / "results"
WIN = 0.97
"""Ours must need less than this share of eager's time to stand in the table: a tie is not worth a second path."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Labelled rows N of hidden size D against a frozen head of V rows; forward and backward."""

    model: str
    rows: int
    hidden: int
    vocab: int
    dtype: torch.dtype
    isa: Isa

    @property
    def name(self) -> str:
        """For people and for the JSON."""
        kind = str(self.dtype).removeprefix("torch.")
        return f"{self.model} N={self.rows} D={self.hidden} V={self.vocab} {kind} {self.isa}"


HEADLINE = Problem(
    model="SmolLM2-135M", rows=512, hidden=576, vocab=49152, dtype=torch.bfloat16, isa="avx512_bf16"
)


def problems() -> list[Problem]:
    """The shapes measured: real models on the best instruction set, small ones on every other."""
    best = current_isa()
    shapes = [
        ("SmolLM2-135M", 512, 576, 49152, torch.bfloat16),
        ("SmolLM2-135M", 32, 576, 49152, torch.bfloat16),
        ("SmolLM2-135M", 512, 576, 49152, torch.float32),
        ("SmolLM2-135M", 32, 576, 49152, torch.float32),
        ("Qwen2.5-0.5B", 128, 896, 151936, torch.bfloat16),
        ("Llama-3.2-1B", 64, 2048, 128256, torch.bfloat16),
        ("tiny", 128, 64, 4096, torch.bfloat16),
        ("tiny", 16, 64, 4096, torch.bfloat16),
        ("tiny", 128, 64, 4096, torch.float32),
        ("tiny", 16, 64, 4096, torch.float32),
    ]
    found = [
        Problem(model=model, rows=rows, hidden=hidden, vocab=vocab, dtype=dtype, isa=best)
        for model, rows, hidden, vocab, dtype in shapes
    ]
    for isa in available_isas():
        for dtype in (torch.bfloat16, torch.float32) if isa != best else ():
            for rows, vocab in ((128, 49152), (16, 49152), (128, 4096), (16, 4096)):
                found.append(Problem(model="head", rows=rows, hidden=256, vocab=vocab, dtype=dtype, isa=isa))
    return found


def contenders(problem: Problem) -> dict[str, Callable[[], None]]:
    """Forward and backward of each contender on the same tensors."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(problem.rows, problem.hidden, generator=generator).to(problem.dtype).requires_grad_()
    weight = (torch.randn(problem.vocab, problem.hidden, generator=generator) * 0.05).to(problem.dtype)
    target = torch.randint(problem.vocab, (problem.rows,), generator=generator)

    def ours() -> None:
        linear_cross_entropy(hidden, weight, target, impl="cpu").loss_sum.backward()  # type: ignore[no-untyped-call]

    def eager() -> None:
        linear_cross_entropy(hidden, weight, target, impl="eager").loss_sum.backward()  # type: ignore[no-untyped-call]

    runs = {"cpu": ours, "eager": eager}
    torch_op = getattr(torch.nn.functional, "linear_cross_entropy", None)
    if torch_op is not None and problem == HEADLINE:
        runs["torch F.linear_cross_entropy"] = lambda: torch_op(
            hidden, weight, target, reduction="sum"
        ).backward()
    return runs


def measure(problem: Problem, repeats: int) -> dict[str, float]:
    """Median seconds of each contender, the contenders taking turns."""
    force_isa(problem.isa)
    try:
        runs = contenders(problem)
        # The first round warms caches up and is not counted.
        rounds = [{name: timed(run) for name, run in runs.items()} for _ in range(repeats + 1)][1:]
    finally:
        force_isa(None)
    return {name: statistics.median(one[name] for one in rounds) for name in runs}


def timed(run: Callable[[], None]) -> float:
    """Seconds that one call takes."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def table(measured: Mapping[Problem, Mapping[str, float]]) -> dict[str, str]:
    """The table that `auto` reads: a class of shapes takes ours only if ours won on every shape of it."""
    wins: dict[str, bool] = {}
    for problem, seconds in measured.items():
        dtype = str(problem.dtype).removeprefix("torch.")
        name = key(problem.isa, dtype, problem.rows, problem.vocab)
        wins[name] = wins.get(name, True) and seconds["cpu"] < WIN * seconds["eager"]
    return {name: "cpu" if won else "eager" for name, won in sorted(wins.items())}


def picture(measured: Mapping[Problem, Mapping[str, float]]) -> str:
    """A bar for each problem: our time over eager's; the line at 1 is eager."""
    row, left, scale = 24, 430, 260
    bars = []
    for index, (problem, seconds) in enumerate(measured.items()):
        ratio = seconds["cpu"] / seconds["eager"]
        y = 40 + index * row
        colour = "#2f7d4f" if ratio < 1 else "#b4452f"
        bars.append(f'<text x="{left - 8}" y="{y + 12}" text-anchor="end">{problem.name}</text>')
        bars.append(
            f'<rect x="{left}" y="{y}" width="{min(ratio, 1.6) * scale:.1f}" height="16" fill="{colour}"/>'
        )
        bars.append(f'<text x="{left + min(ratio, 1.6) * scale + 6:.1f}" y="{y + 12}">{ratio:.2f}</text>')
    height = 60 + len(measured) * row
    line = f'<line x1="{left + scale}" y1="30" x2="{left + scale}" y2="{height - 14}" stroke="#555"/>'
    title = '<text x="20" y="20" font-weight="bold">linear_cross_entropy, forward + backward: time over eager</text>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="900" height="{height}" font-family="sans-serif" '
        f'font-size="12"><rect width="100%" height="100%" fill="white"/>{title}{line}{"".join(bars)}</svg>\n'
    )


def main() -> int:
    """Measure, write the results, print the summary."""
    parser = argparse.ArgumentParser(description="Time the kernels.")
    parser.add_argument("--repeats", type=int, default=7, help="counted rounds")
    parser.add_argument("--write-table", action="store_true", help="also write the tables that `auto` reads")
    arguments = parser.parse_args()
    measured = {}
    for problem in problems():
        measured[problem] = measure(problem, arguments.repeats)
        shown = "  ".join(f"{name} {1e3 * seconds:.1f} ms" for name, seconds in measured[problem].items())
        print(f"{problem.name}: {shown}", flush=True)
    if arguments.write_table:
        TABLE_PATH.write_text(json.dumps(table(measured), indent=2) + "\n")
    summary = {
        "linear_cross_entropy_vs_eager": round(measured[HEADLINE]["cpu"] / measured[HEADLINE]["eager"], 3)
        if HEADLINE in measured
        else None,
        "slower_than_eager": [
            one.name for one, seconds in measured.items() if seconds["cpu"] > seconds["eager"]
        ],
    }
    RESULTS.mkdir(exist_ok=True)
    rows = [
        {"problem": problem.name, "median_seconds": dict(seconds)} for problem, seconds in measured.items()
    ]
    machine = {"threads": torch.get_num_threads(), "torch": torch.__version__, "isa": current_isa()}
    document = {"machine": machine, "repeats": arguments.repeats, "rows": rows, **summary}
    (RESULTS / "kernels.json").write_text(json.dumps(document, indent=2) + "\n")
    (RESULTS / "kernels.svg").write_text(picture(measured))
    print(json.dumps(summary))
    return 0


if __name__ == "__main__":
    sys.exit(main())
