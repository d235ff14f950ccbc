"""The main job for real: examples in, a tuned model out, and the proof that it beats prompting.

Starts `luthierd up` on free ports with a home of its own, types the commands that a user would type, shows each of
them, and stops every process it started. Exit status 0 only if the tuned model wins: the lower bound of the paired
95 % interval of whole-record accuracy, tuned minus the best prompt, is above 0.

    PYTHONPATH=examples python examples/earnings/demo.py [--fast] [--home FOLDER] [--report FILE]
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import generate
from companies import Split
from stack import (
    MODEL,
    Shell,
    comparison,
    connection,
    create_dataset,
    create_rendering,
    have_base_model,
    proven,
    rates,
    say,
    services,
)

from luthier.client import Client
from luthier.v1.evaluation_pb2 import Evaluation

RECORD_SCORE = "field_match.record"


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """How much to spend. `must_win` says whether a tie is a failure."""

    train: int
    validation: int
    max_steps: int
    records: int
    must_win: bool


FULL = Budget(train=720, validation=64, max_steps=45, records=48, must_win=True)
FAST = Budget(train=24, validation=8, max_steps=2, records=4, must_win=False)


def main() -> int:
    """Run the demo; returns the exit status."""
    parser = argparse.ArgumentParser(description="Tune a small model on synthetic earnings news.")
    parser.add_argument("--fast", action="store_true", help="a tiny budget; no win is asked for")
    parser.add_argument(
        "--home", type=Path, default=Path(".demo"), help="state of the demo, kept for next time"
    )
    parser.add_argument("--report", type=Path, default=Path("demo-report.html"), help="HTML report to write")
    arguments = parser.parse_args()
    budget = FAST if arguments.fast else FULL
    began = time.monotonic()
    home = arguments.home.resolve()
    with services(home) as environment:
        shell = Shell(environment)
        with Client(connection(environment, home)) as client:
            evaluation = run(shell, client, home, budget, arguments.report)
    say(f"\n{time.monotonic() - began:.0f} s from start to report; every process is stopped.")
    return 0 if judge(evaluation) or not budget.must_win else 1


def run(shell: Shell, client: Client, home: Path, budget: Budget, report: Path) -> Evaluation:
    """Go from raw examples to a judged model; returns the evaluation."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    say("\n1  The base model (downloaded and registered once)")
    have_base_model(shell, client)

    say("\n2  Synthetic earnings news, uploaded, checked and split")
    sizes: dict[Split, int] = {
        "train": budget.train,
        "validation": budget.validation,
        "test": budget.records,
    }
    files = generate.write(home / "earnings", sizes, seed=0)
    version = create_dataset(shell, client, f"earnings-{stamp}", files)

    say("\n3  Rendered to tokens; what is learnt stands out")
    rendering = create_rendering(shell, client, version)
    shell.luthier("renderings", "preview", rendering, "--limit", "2")

    say("\n4  Planned, then tuned")
    settings = ["--model", MODEL, "--rendering", rendering, "--max-steps", str(budget.max_steps)]
    settings += ["--batch-tokens", "2048", "--learning-rate", "1.5e-3", "--warmup-steps", "3"]
    shell.luthier("jobs", "plan", *settings)
    tuned = f"tuned-{stamp}"
    shell.luthier("jobs", "create", *settings, "--name", tuned, "--watch")

    say("\n5  Judged: zero-shot, three-shot and tuned on the same held-out records")
    arms = (f"zero-shot={MODEL}:0", f"three-shot={MODEL}:3", f"tuned={tuned}:0")
    chosen = [word for arm in arms for word in ("--arm", arm)]
    limits = ["--max-records", str(budget.records), "--max-new-tokens", "96"]
    metrics = ["--metric", "field-match", "--metric", "exact-match", "--metric", "perplexity"]
    name = f"earnings-{stamp}"
    shell.luthier(
        "evaluations", "create", "--version", version, *chosen, *metrics, *limits, "--name", name, "--watch"
    )
    shell.luthier("evaluations", "report", name, "--output", str(report))
    return client.evaluations.get(name)


def judge(evaluation: Evaluation) -> bool:
    """Say whether tuning was worth it: whole records right, tuned minus the best prompt."""
    rate = rates(evaluation, RECORD_SCORE)
    best = max((arm for arm in rate if arm != "tuned"), key=rate.__getitem__)
    return proven(evaluation, comparison(evaluation, RECORD_SCORE, "tuned", best), "Whole records right")


if __name__ == "__main__":
    sys.exit(main())
