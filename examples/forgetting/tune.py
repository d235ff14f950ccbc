"""What is forgotten, for real: an adapter and all weights, each alone and with 20 % replay, in one table.

A model learns to turn earnings news into JSON (examples/earnings) four times, in as many steps. Replay is what the base
model itself answers to general questions. One evaluation asks all of them the same held-out records, and measures drift
(docs/evaluations.md): what is retained of the general suite, the divergence from the base, and general text. Exit
status 0 only if all four learnt the task: the paired interval of whole records right, minus the base, lies above 0.

With --control a model is taught noise and another nothing: the suite has to tell them apart (`noise.py`).

    make example NAME=forgetting [CONTROL=1] [FAST=1]
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import chats
import generate
from companies import Split
from forgetting import general, noise
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

from luthier.client.drift import divergence_words, retained_words, text_loss_words
from luthier.client.scores import estimate_words
from luthier.v1.evaluation_pb2 import DriftResult, Evaluation

BASE = "base"
REPLAYED = 0.2
LORA, ALL = ("--learning-rate", "1.5e-3"), ("--full", "--learning-rate", "2e-4")
ARMS: Mapping[str, tuple[Sequence[str], bool]] = {
    "lora": (LORA, False),
    "full": (ALL, False),
    "lora-replay": (LORA, True),
    "full-replay": (ALL, True),
}
"""What differs between the jobs, and whether general answers are mixed in."""
RECORD_SCORE = "field_match.record"


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """How much to spend on each of them."""

    train: int
    validation: int
    general: int
    max_steps: int
    records: int
    questions: int


FULL = Budget(train=720, validation=64, general=240, max_steps=45, records=48, questions=0)
FAST = Budget(train=24, validation=8, general=16, max_steps=2, records=4, questions=4)


def run(stage: Stage) -> bool:
    """Tune all of them and show the table; returns whether all have learnt."""
    if stage.is_control:
        return noise.run(stage)
    budget, stamp = FAST if stage.is_fast else FULL, stage.stamp
    folder = stage.home / "forgetting"
    say("\n2  Earnings news, and what the base model itself answers to general questions")
    sizes: dict[Split, int] = {"train": budget.train, "validation": budget.validation, "test": budget.records}
    version = create_dataset(
        stage.shell, stage.client, f"earnings-{stamp}", generate.write(folder, sizes, seed=0)
    )
    rendering = create_rendering(stage.shell, stage.client, version)
    replayed = create_rendering(stage.shell, stage.client, replay_version(stage, folder, budget))

    say("\n3  Tuned four times in as many steps")
    for arm in ARMS:
        tune(stage, arm, rendering, replayed, budget)

    say("\n4  Asked the same held-out records, and the general suite")
    limits = [
        "--max-records",
        str(budget.records),
        "--max-new-tokens",
        "96",
        "--metric",
        "field-match",
        "--drift",
    ]
    limits += ["--set", f"drift.max_questions={budget.questions}"] if budget.questions else []
    models = {BASE: MODEL, **{arm: f"{arm}-{stamp}" for arm in ARMS}}
    done = before_and_after(stage.shell, stage.client, version, f"forgetting-{stamp}", models, *limits)
    say(f"\n{table(done)}")
    learnt = {arm: have_learnt(done, arm) for arm in ARMS}
    return all(learnt.values())


def replay_version(stage: Stage, folder: Path, budget: Budget) -> str:
    """Have the base model answer general questions, once for a home; returns the version of its answers."""
    path = folder / f"general-{budget.general}.jsonl"
    if not path.exists():
        say(f"{budget.general} general questions are put to {MODEL}")
        asked = general.questions(budget.general, seed=0)
        chats.write(path, list(general.answered(stage.client, MODEL, asked)))
    files: Mapping[Split, Path] = {"train": path}
    return create_dataset(stage.shell, stage.client, f"general-{stage.stamp}", files)


def tune(stage: Stage, arm: str, rendering: str, replayed: str, budget: Budget) -> None:
    """Plan and run the job of an arm, whose name the tuned model has too."""
    differing, has_replay = ARMS[arm]
    settings = ["--model", MODEL, "--rendering", rendering, "--max-steps", str(budget.max_steps)]
    settings += ["--batch-tokens", "2048", "--warmup-steps", "3", *differing]
    settings += ["--mix", f"{replayed}={REPLAYED}"] if has_replay else []
    stage.shell.luthier("jobs", "plan", *settings)
    stage.shell.luthier("jobs", "create", *settings, "--name", f"{arm}-{stage.stamp}", "--watch")


def have_learnt(evaluation: Evaluation, arm: str) -> bool:
    """Say how an arm differs from the base; returns whether it is better."""
    return proven(evaluation, comparison(evaluation, RECORD_SCORE, arm, BASE), "Whole records right")


def table(evaluation: Evaluation) -> str:
    """Return a table in Markdown: a row for each arm, what it learnt beside what it kept."""
    right = {
        result.arm_id: estimate_words(one)
        for result in evaluation.arm_results
        for one in result.scores
        if one.score == RECORD_SCORE
    }
    drifts = {result.arm_id: result for result in evaluation.drift_results}
    rows = [["", "whole records right", "retained", "divergence", "general text, bits a byte"]]
    rows += [[arm, words, *_kept(drifts.get(arm))] for arm, words in right.items()]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def _kept(result: DriftResult | None) -> list[str]:
    if result is None:
        return ["", "", ""]
    return [retained_words(result), divergence_words(result), text_loss_words(result)]


if __name__ == "__main__":
    sys.exit(play("Tune a small model four times and see what it forgets.", run))
