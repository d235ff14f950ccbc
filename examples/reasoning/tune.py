"""Reinforcement for real: a model that adds numbers at once or in steps finds out which is right more often.

First answers of both kinds are taught, one in steps for two at once (SFT); then the model draws answers of its own,
and those with the right sum are rewarded (GRPO, from the taught adapter on). Nothing says that steps help. Judged on
sums that neither has seen, by how many are right. Exit status 0 only if the lower bound of the paired 95 % interval,
after reinforcement minus before, is above 0. With --control every answer is worth the same: the job has to fail with
NO_REWARD_SPREAD.

    make example NAME=reasoning [FAST=1] [CONTROL=1]
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from chats import every, write
from reasoning import sums
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

SCORE = "field_match.fields"
BEFORE, AFTER = "taught", "rewarded"
HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """How many records to spend, and how many steps of reinforcement."""

    taught: int
    asked: int
    validation: int
    test: int
    num_steps: int


FULL = Budget(taught=300, asked=64, validation=8, test=64, num_steps=10)
FAST = Budget(taught=16, asked=4, validation=2, test=4, num_steps=1)


def run(stage: Stage) -> bool:
    """Teach both kinds of answers, then reward right sums; returns whether more sums are right."""
    shell, client, stamp = stage.shell, stage.client, stage.stamp
    budget = FAST if stage.is_fast else FULL
    files = write_files(stage.home / "reasoning", budget)
    say("\n2  Answers of both kinds, taught")
    version = create_dataset(shell, client, f"sums-{stamp}", files.answers)
    rendering = create_rendering(shell, client, version)
    settings = ["--rendering", rendering, "--batch-tokens", "1024", "--learning-rate", "1e-3"]
    shell.luthier("jobs", "create", "--model", MODEL, *settings, "--name", f"taught-{stamp}", "--watch")

    say("\n3  Right sums, rewarded")
    asked = create_dataset(shell, client, f"questions-{stamp}", files.questions)
    rendering = create_rendering(shell, client, asked, "--kind", "prompt")
    # A tiny budget teaches no sums, so that no answer would be rewarded.
    is_hopeless = stage.is_control or stage.is_fast
    grader = HERE / ("constant.yaml" if is_hopeless else "grader.yaml")
    settings = ["--start-from", f"taught-{stamp}", "--rendering", rendering, "--reinforcement", str(grader)]
    settings += [
        "--num-samples",
        "8",
        "--max-new-tokens",
        "48",
        "--batch-rows",
        "4",
        "--learning-rate",
        "3e-4",
    ]
    settings += ["--max-steps", str(budget.num_steps), "--validation-interval", str(budget.num_steps)]
    shell.luthier("jobs", "plan", *settings)
    create = ("jobs", "create", *settings, "--name", f"rewarded-{stamp}", "--watch")
    if is_hopeless:
        return "NO_REWARD_SPREAD" in shell.failing(*create)
    shell.luthier(*create)
    shell.luthier("jobs", "rollouts", f"rewarded-{stamp}", "--step", "1")

    say("\n4  Judged: before and after reinforcement, on the same held-out sums")
    models = {BEFORE: f"taught-{stamp}", AFTER: f"rewarded-{stamp}"}
    limits = ("--max-new-tokens", "48", "--metric", "field-match")
    evaluation = before_and_after(shell, client, version, f"reasoning-{stamp}", models, *limits)
    return proven(evaluation, comparison(evaluation, SCORE, AFTER, BEFORE), "Sums that are right")


@dataclass(frozen=True, slots=True, kw_only=True)
class Files:
    """What is uploaded, by split."""

    answers: Mapping[str, Path]
    questions: Mapping[str, Path]


def write_files(folder: Path, budget: Budget) -> Files:
    """Write answers of both kinds and questions with their sums alone; no sum stands in two files."""
    sizes = (budget.taught, budget.validation, budget.test, budget.asked, budget.validation)
    drawn = iter(sums.draw(sum(sizes), seed=0))
    taught, validation, test, asked, held = (list(islice(drawn, size)) for size in sizes)
    answers = {
        "train": sums.conversations(taught, has_steps=every(3, len(taught))),
        "validation": sums.conversations(validation, has_steps=every(3, len(validation))),
        "test": sums.conversations(test, has_steps=[False] * len(test)),
    }
    questions = {
        "train": sums.conversations(asked, has_steps=[False] * len(asked)),
        "validation": sums.conversations(held, has_steps=[False] * len(held)),
    }
    return Files(
        answers={split: write(folder / f"{split}.jsonl", found) for split, found in answers.items()},
        questions={
            split: write(folder / f"questions-{split}.jsonl", found) for split, found in questions.items()
        },
    )


if __name__ == "__main__":
    sys.exit(play("Let a small model find out how sums are right more often.", run))
