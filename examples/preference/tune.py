"""Preference tuning for real: a model that answers at length or in short learns that short is preferred.

First answers of both kinds are taught, two long ones for each short one (SFT); then pairs say which is better (DPO,
from the tuned adapter on). Judged on questions that neither has seen, by how many answers are exactly the short one.
Exit status 0 only if the lower bound of the paired 95 % interval, after preference tuning minus before, is above 0.
With --control every second pair says the opposite: then there is nothing to learn, and the exit status is 0 only if
there is no such proof.

    make example NAME=preference [FAST=1] [CONTROL=1]
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from chats import every, write
from preference import orders
from stack import (
    MODEL,
    Stage,
    before_and_after,
    comparison,
    create_dataset,
    create_rendering,
    play,
    proven,
    say,
)

SCORE = "exact_match"
BEFORE, AFTER = "taught", "preferring"


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """How many records to spend."""

    taught: int
    pairs: int
    validation: int
    test: int


FULL = Budget(taught=240, pairs=96, validation=16, test=64)
FAST = Budget(taught=16, pairs=8, validation=4, test=4)


def run(stage: Stage) -> bool:
    """Teach both kinds of answers, then which is preferred; returns whether that is what was learnt."""
    shell, client, stamp = stage.shell, stage.client, stage.stamp
    files = write_files(
        stage.home / "preference", FAST if stage.is_fast else FULL, is_control=stage.is_control
    )
    say("\n2  Answers of both kinds, taught")
    version = create_dataset(shell, client, f"answers-{stamp}", files.answers)
    rendering = create_rendering(shell, client, version)
    settings = ["--rendering", rendering, "--batch-tokens", "1024", "--learning-rate", "1e-3"]
    shell.luthier("jobs", "create", "--model", MODEL, *settings, "--name", f"taught-{stamp}", "--watch")

    say("\n3  Pairs that say which answer is better")
    pairs = create_dataset(shell, client, f"pairs-{stamp}", files.pairs)
    rendering = create_rendering(shell, client, pairs, "--kind", "preference")
    shell.luthier("renderings", "preview", rendering, "--limit", "2")
    settings = [
        "--rendering",
        rendering,
        "--preference",
        "dpo",
        "--batch-tokens",
        "2048",
        "--learning-rate",
        "2e-4",
    ]
    settings += ["--start-from", f"taught-{stamp}"]
    shell.luthier("jobs", "plan", *settings)
    shell.luthier("jobs", "create", *settings, "--name", f"preferring-{stamp}", "--watch")

    say("\n4  Judged: before and after preference tuning, on the same held-out questions")
    models = {BEFORE: f"taught-{stamp}", AFTER: f"preferring-{stamp}"}
    limits = ("--max-new-tokens", "48", "--metric", "exact-match")
    evaluation = before_and_after(shell, client, version, f"preference-{stamp}", models, *limits)
    found = comparison(evaluation, SCORE, AFTER, BEFORE)
    return proven(evaluation, found, "Answers that are exactly the short one") != stage.is_control


@dataclass(frozen=True, slots=True, kw_only=True)
class Files:
    """What is uploaded, by split."""

    answers: Mapping[str, Path]
    pairs: Mapping[str, Path]


def write_files(folder: Path, budget: Budget, *, is_control: bool) -> Files:
    """Write answers of both kinds and pairs; no question stands in two files."""
    sizes = (budget.taught, budget.validation, budget.test, budget.pairs, budget.validation)
    drawn = iter(orders.examples(sum(sizes), seed=0))
    taught, validation, test, compared, held = (list(islice(drawn, size)) for size in sizes)
    agrees = every(2, len(compared)) if is_control else [True] * len(compared)
    answers = {
        "train": orders.conversations(taught, is_short=every(3, len(taught))),
        "validation": orders.conversations(validation, is_short=every(3, len(validation))),
        "test": orders.conversations(test, is_short=[True] * len(test)),
    }
    pairs = {
        "train": orders.pairs(compared, prefers_short=agrees),
        "validation": orders.pairs(held, prefers_short=[True] * len(held)),
    }
    return Files(
        answers={split: write(folder / f"{split}.jsonl", found) for split, found in answers.items()},
        pairs={split: write(folder / f"pairs-{split}.jsonl", found) for split, found in pairs.items()},
    )


if __name__ == "__main__":
    sys.exit(play("Tune a small model to prefer short answers.", run))
