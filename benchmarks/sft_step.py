"""One fine-tuning step on a CPU: ours against the libraries that people use, on the same rows.

`python benchmarks/sft_step.py --data FILE` trains every contender's adapter on the same rows in the same optimiser
steps, each in a process of its own, the contenders taking turns; `--method full` trains all weights instead: float32
ones, peers with bfloat16 autocast as ours computes, and also without. It writes results/sft_step.json and .svg
(full_step.json and .svg), prints a table, and ends with one line of JSON: `tps_vs_best_peer` (`full_vs_best_peer`) is
our tokens per second by those of the fastest peer. The peers come with the extra `bench`; one that is not installed is
named in the table. `--fast` is a smoke run on a tiny random model; it writes no results.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from child_process import Measured, measured_apart
from sft_step_contenders import DEFAULTS, METHODS, OURS, Contender
from sft_step_report import outcome_of, picture, summary_of, table
from sft_step_task import ROWS_PER_STEP, Task, demo_model, fresh_adapter, render_rows, tiny_model
from transformers.utils import logging as transformers_logging

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate", "datasets")


def make_task(arguments: argparse.Namespace, folder: Path) -> Task:
    """Prepare the model, the adapter and the rows; files that only this run needs go into `folder`.

    Raises:
        ValueError: rows cannot be cut into steps, or there are too few.
    """
    if arguments.rows < ROWS_PER_STEP or arguments.rows % ROWS_PER_STEP:
        raise ValueError(f"--rows must be a multiple of {ROWS_PER_STEP}, got {arguments.rows}")
    steps = arguments.steps or arguments.rows // ROWS_PER_STEP
    if steps < 2:
        raise ValueError(f"--steps must be at least 2, as the first one is not timed, got {steps}")
    wanted = arguments.rows + arguments.heldout
    records = json.loads(arguments.data.read_text()) if arguments.data else made_up_records(wanted)
    model = arguments.model or (tiny_model(folder / "model", records) if arguments.fast else demo_model())
    rows = render_rows(records, model, wanted)
    return Task(
        model=model,
        adapter=fresh_adapter(model, folder / "adapter"),
        method=arguments.method,
        rows=rows[: arguments.rows],
        heldout=rows[arguments.rows :],
        num_steps=steps,
        micro_batch_tokens=arguments.micro_batch_tokens,
    )


def made_up_records(count: int) -> list[dict[str, str]]:
    """Sums, as Alpaca records of differing lengths: enough for a smoke run."""
    return [
        {
            "instruction": f"Add the numbers from 1 to {number + 2}.",
            "input": "",
            "output": " + ".join(map(str, range(1, number % 40 + 3))) + f" = {number}",
        }
        for number in range(count)
    ]


def run_child(task: Path, name: str, contender: Contender, *options: str) -> dict[str, Any]:
    """Measure one contender in a process of its own; `error` says why where it failed."""
    result, script = task.with_name("result.json"), Path(__file__).with_name("sft_step_contenders.py")
    return measured_apart(script, (task, name, result, *options), result, contender.missing())


def in_rounds(
    names: Sequence[str], repeats: int, run: Callable[[str, int], Measured]
) -> tuple[dict[str, list[Measured]], dict[str, str]]:
    """Return what `run` measured of each contender in each round, in which all take a turn, and who failed why."""
    runs: dict[str, list[Measured]] = {name: [] for name in names}
    errors: dict[str, str] = {}
    for turn in range(repeats):
        for name in [one for one in names if one not in errors]:
            measured = run(name, turn)
            if "error" in measured:
                errors[name] = measured["error"]
            else:
                runs[name].append(measured)
            shown = errors.get(name) or f"{sum(measured['step_seconds'][1:]):.1f} s"
            print(f"round {turn + 1}/{repeats} {name}: {shown}", file=sys.stderr, flush=True)
    return runs, errors


def measure(
    task: Path, contenders: Mapping[str, Contender], repeats: int, *, profiling: bool
) -> dict[str, dict[str, Any]]:
    """Each contender's outcome, from rounds in which all take a turn."""

    def run(name: str, turn: int) -> Measured:
        return run_child(task, name, contenders[name], *(["--evaluate"] if turn == 0 else []))

    runs, errors = in_rounds(list(contenders), repeats, run)
    outcomes: dict[str, dict[str, Any]] = {}
    for name, contender in contenders.items():
        if name in errors:
            outcomes[name] = {"error": errors[name]}
            continue
        profiled = run_child(task, name, contender, "--profile") if profiling else None
        outcomes[name] = outcome_of(runs[name], profiled)
    return outcomes


def surroundings() -> dict[str, Any]:
    """The machine and the versions that the figures are true for."""
    installed = {distribution.metadata["Name"].lower() for distribution in importlib.metadata.distributions()}
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "processor": names[0] if names else platform.machine(),
        "processors": os.cpu_count(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES if name in installed},
    }


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Time one fine-tuning step against its peers.")
    parser.add_argument("--method", choices=list(METHODS), default="lora", help="what trains (default lora)")
    parser.add_argument("--data", type=Path, help="JSON array of records (needed without --fast)")
    parser.add_argument("--rows", type=int, default=64, help="rows to train on (default 64)")
    parser.add_argument("--heldout", type=int, default=32, help="rows for the held-out loss (default 32)")
    parser.add_argument("--steps", type=int, default=0, help="optimiser steps (default: every row once)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds (default 3)")
    parser.add_argument("--model", type=Path, help="model folder (default: the demo's base model)")
    parser.add_argument("--contenders", default="", help="a few of them, by comma (default: all)")
    parser.add_argument("--micro-batch-tokens", type=int, default=2048, help="most tokens of a packed pass")
    parser.add_argument("--no-profile", action="store_true", help="leave out the profiled runs")
    parser.add_argument("--fast", action="store_true", help="a smoke run on a tiny random model")
    arguments = parser.parse_args(argv)
    known = METHODS[arguments.method].contenders
    arguments.contenders = arguments.contenders.split(",") if arguments.contenders else list(known)
    unknown = sorted(set(arguments.contenders) - set(known))
    if unknown:
        parser.error(f"--contenders must be of {', '.join(known)}, got {', '.join(unknown)}")
    if arguments.data is None and not arguments.fast:
        parser.error("--data is needed without --fast")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write the results, print the table and the summary."""
    arguments = parse(argv)
    method = METHODS[arguments.method]
    contenders = {name: method.contenders[name] for name in arguments.contenders}
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    with tempfile.TemporaryDirectory() as scratch:
        task = make_task(arguments, Path(scratch))
        task.save(Path(scratch) / "task.json")
        outcomes = measure(
            Path(scratch) / "task.json", contenders, arguments.repeats, profiling=not arguments.no_profile
        )
    summary = summary_of(outcomes, OURS, DEFAULTS, method.reference, method.speed_key)
    configurations = {name: contender.configuration for name, contender in contenders.items()}
    print(table(outcomes, configurations))
    if not arguments.fast:
        work = {
            "rows": arguments.rows,
            "heldout": arguments.heldout,
            "steps": task.num_steps,
            "step_tokens": task.step_tokens(),
            "micro_batch_tokens": task.micro_batch_tokens,
            "repeats": arguments.repeats,
        }
        document = {"machine": surroundings(), "work": work, "contenders": outcomes}
        document |= {"configurations": configurations, **summary}
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{method.results}.json").write_text(json.dumps(document, indent=2) + "\n")
        (RESULTS / f"{method.results}.svg").write_text(picture(outcomes, method.what))
    print(json.dumps(summary))
    return int("error" in outcomes.get(OURS[0], {}))


if __name__ == "__main__":
    sys.exit(main())
