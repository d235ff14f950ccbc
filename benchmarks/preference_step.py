"""One DPO step with an adapter on a CPU: ours against TRL's DPOTrainer, on the same pairs.

`python benchmarks/preference_step.py --data FILE` trains every contender on the same pairs in the same optimiser steps,
each in a process of its own, the contenders taking turns. A pair is a record's answer and, rejected, the next record's.
It writes results/preference_step.json, prints a table, and ends with one line of JSON: `dpo_vs_trl` is our tokens per
second by those of TRL's fastest setting, `dpo_rss_vs_trl` our most memory by that setting's. TRL comes with the extra
`bench`. `--fast` is a smoke run on a tiny random model; it writes no results.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from child_process import measured_apart
from preference_step_contenders import CONTENDERS, OURS, Pair, PairTask
from sft_step import in_rounds, made_up_records, surroundings
from sft_step_task import Row, demo_model, fresh_adapter, render_rows, tiny_model
from transformers.utils import logging as transformers_logging

RESULTS = Path(__file__).parent / "results"
STEP_PAIRS = 8


def make_task(arguments: argparse.Namespace, folder: Path) -> PairTask:
    """Prepare the model, the adapter and the pairs; files that only this run needs go into `folder`.

    Raises:
        ValueError: there are fewer than two steps, of which the first is not timed.
    """
    if arguments.pairs < 2 * STEP_PAIRS or arguments.pairs % STEP_PAIRS:
        raise ValueError(
            f"--pairs must be a multiple of {STEP_PAIRS} from {2 * STEP_PAIRS} on, got {arguments.pairs}"
        )
    wanted = arguments.pairs + 1
    records = json.loads(arguments.data.read_text()) if arguments.data else made_up_records(wanted)
    model = arguments.model or (tiny_model(folder / "model", records) if arguments.fast else demo_model())
    rows = render_rows(records, model, wanted)
    return PairTask(
        model=model,
        adapter=fresh_adapter(model, folder / "adapter"),
        pairs=tuple(pair_of(row, other) for row, other in pairwise(rows)),
        step_pairs=STEP_PAIRS,
        micro_batch_tokens=arguments.micro_batch_tokens,
    )


def pair_of(row: Row, other: Row) -> Pair:
    """A row's prompt and answer, and the other row's answer rejected."""
    start, other_start = (one.supervised.index(True) for one in (row, other))
    return Pair(prompt=row.ids[:start], chosen=row.ids[start:], rejected=other.ids[other_start:])


def run_child(task: Path, name: str) -> dict[str, Any]:
    """Measure one contender in a process of its own; `error` says why where it failed."""
    result, script = task.with_name("result.json"), Path(__file__).with_name("preference_step_contenders.py")
    return measured_apart(script, (task, name, result), result, CONTENDERS[name].missing())


def outcome_of(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Medians over a contender's rounds; the first step of each run is not timed, but its loss is kept."""
    speeds = [sum(run["step_tokens"][1:]) / sum(run["step_seconds"][1:]) for run in runs]
    return {
        "tokens_per_second": statistics.median(speeds),
        "tokens_per_second_by_round": speeds,
        "peak_rss_bytes": statistics.median(run["peak_rss_bytes"] for run in runs),
        "losses": runs[0]["losses"],
        "threads": runs[0]["threads"],
    }


def summary_of(outcomes: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The figures that releases are compared by; None where ours or all of TRL did not run."""
    done = {name: one for name, one in outcomes.items() if "error" not in one}
    peers = [name for name in done if name != OURS]
    if OURS not in done or not peers:
        return {"dpo_vs_trl": None, "dpo_rss_vs_trl": None, "best_setting": None, "last_loss_gap": None}
    best = max(peers, key=lambda name: float(done[name]["tokens_per_second"]))
    ours, theirs = done[OURS], done[best]
    return {
        "dpo_vs_trl": round(ours["tokens_per_second"] / theirs["tokens_per_second"], 3),
        "dpo_rss_vs_trl": round(ours["peak_rss_bytes"] / theirs["peak_rss_bytes"], 3),
        "best_setting": best,
        "last_loss_gap": round(ours["losses"][-1] - theirs["losses"][-1], 4),
    }


def table(outcomes: Mapping[str, Mapping[str, Any]]) -> str:
    """The results as text."""
    lines = [f"{'contender':22}{'tokens/s':>10}{'peak GB':>10}{'first loss':>12}{'last loss':>12}"]
    for name, one in outcomes.items():
        if "error" in one:
            lines.append(f"{name:22}  did not run: {one['error']}")
            continue
        lines.append(
            f"{name:22}{one['tokens_per_second']:>10.1f}{one['peak_rss_bytes'] / 1e9:>10.2f}"
            f"{one['losses'][0]:>12.4f}{one['losses'][-1]:>12.4f}"
        )
    return "\n".join(lines)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Time one DPO step with an adapter against TRL's.")
    parser.add_argument("--data", type=Path, help="JSON array of records (needed without --fast)")
    parser.add_argument("--pairs", type=int, default=32, help="pairs to train on (default 32)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds (default 3)")
    parser.add_argument("--model", type=Path, help="model folder (default: the demo's base model)")
    parser.add_argument("--micro-batch-tokens", type=int, default=2048, help="most tokens of a packed pass")
    parser.add_argument("--fast", action="store_true", help="a smoke run on a tiny random model")
    arguments = parser.parse_args(argv)
    if arguments.data is None and not arguments.fast:
        parser.error("--data is needed without --fast")
    return arguments


def measure_all(task: Path, repeats: int) -> dict[str, dict[str, Any]]:
    """Each contender's outcome, from rounds in which all take a turn."""
    runs, errors = in_rounds(list(CONTENDERS), repeats, lambda name, _: run_child(task, name))
    return {
        name: {"error": errors[name]} if name in errors else outcome_of(of_name)
        for name, of_name in runs.items()
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write the results, print the table and the summary."""
    arguments = parse(argv)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    with tempfile.TemporaryDirectory() as scratch:
        task = make_task(arguments, Path(scratch))
        task.save(Path(scratch) / "task.json")
        outcomes = measure_all(Path(scratch) / "task.json", arguments.repeats)
    summary = summary_of(outcomes)
    print(table(outcomes))
    if not arguments.fast:
        work = {
            "pairs": arguments.pairs,
            "step_pairs": STEP_PAIRS,
            "step_tokens": [sum(pair.num_tokens for pair in step) for step in task.steps()],
            "micro_batch_tokens": task.micro_batch_tokens,
            "repeats": arguments.repeats,
        }
        configurations = {name: CONTENDERS[name].configuration for name in outcomes}
        document = {"machine": surroundings(), "work": work, "contenders": outcomes}
        document |= {"configurations": configurations, **summary}
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "preference_step.json").write_text(json.dumps(document, indent=2) + "\n")
    print(json.dumps(summary))
    return int("error" in outcomes[OURS])


if __name__ == "__main__":
    sys.exit(main())
