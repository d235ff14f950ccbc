"""All weights beside an adapter, for real: the same model, records and steps, both judged, in one table.

A model learns to turn earnings news into JSON (examples/earnings) twice: by an adapter (LoRA) and by all its weights.
One evaluation asks both, and the model as it was, the same held-out records, though the second has weights of its own
and so is another base; what either costs stands below what it gives. Exit status 0 only if both learnt: the paired
interval of whole records right, minus the base, lies above 0 for each.

    make example NAME=full_vs_lora [FAST=1]
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import generate
from companies import Split
from full_vs_lora.memory import watched
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

from luthier.client import Client
from luthier.client.scores import difference_words, estimate_words, verdict_word
from luthier.v1.evaluation_pb2 import Evaluation, ScoreEstimate
from luthier.v1.fine_tuning_job_pb2 import MetricPoint

BASE, LORA, ALL = "base", "lora", "full"
ADAPTATIONS: Mapping[str, Sequence[str]] = {
    LORA: ("--learning-rate", "1.5e-3"),
    ALL: ("--full", "--learning-rate", "2e-4"),
}
"""What differs between both jobs."""
RECORD_SCORE = "field_match.record"
SCORES: Mapping[str, str] = {
    RECORD_SCORE: "whole records right",
    "field_match.fields": "fields right",
    "exact_match": "answers equal",
    "perplexity": "perplexity",
}
"""What the table shows of an evaluation, and what it calls it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """How much to spend on each of both."""

    train: int
    validation: int
    max_steps: int
    records: int


FULL = Budget(train=720, validation=64, max_steps=45, records=48)
FAST = Budget(train=24, validation=8, max_steps=2, records=4)


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What a job took: its steps after the first, which warms up, and the most memory that its worker held."""

    seconds_per_step: float
    tokens_per_second: float
    peak_bytes: int


def run(stage: Stage) -> bool:
    """Tune both and show the table; returns whether both have learnt."""
    budget, stamp = FAST if stage.is_fast else FULL, stage.stamp
    say("\n2  Synthetic earnings news, uploaded, checked and rendered")
    sizes: dict[Split, int] = {"train": budget.train, "validation": budget.validation, "test": budget.records}
    files = generate.write(stage.home / "full_vs_lora", sizes, seed=0)
    version = create_dataset(stage.shell, stage.client, f"earnings-{stamp}", files)
    rendering = create_rendering(stage.shell, stage.client, version)

    say("\n3  Tuned twice on the same rows: an adapter, then all weights")
    costs = {arm: tuned(stage, arm, rendering, budget) for arm in ADAPTATIONS}

    say("\n4  Judged on the same held-out records")
    limits = ["--max-records", str(budget.records), "--max-new-tokens", "96"]
    limits += ["--metric", "field-match", "--metric", "exact-match", "--metric", "perplexity"]
    models = {BASE: MODEL, LORA: f"{LORA}-{stamp}", ALL: f"{ALL}-{stamp}"}
    evaluation = before_and_after(
        stage.shell, stage.client, version, f"full-vs-lora-{stamp}", models, *limits
    )
    sizes_bytes = {arm: model_bytes(stage.client, model) for arm, model in models.items()}
    say(f"\n{table(estimates(evaluation), costs, sizes_bytes)}")
    return have_learnt(evaluation)


def tuned(stage: Stage, arm: str, rendering: str, budget: Budget) -> Costs:
    """Plan and run the job of an arm, whose name the tuned model has too; returns what it took."""
    name = f"{arm}-{stage.stamp}"
    settings = ["--model", MODEL, "--rendering", rendering, "--max-steps", str(budget.max_steps)]
    settings += ["--batch-tokens", "2048", "--warmup-steps", "3", *ADAPTATIONS[arm]]
    stage.shell.luthier("jobs", "plan", *settings)
    with watched("luthier.training.worker", stage.home) as memory:
        stage.shell.luthier("jobs", "create", *settings, "--name", name, "--watch")
    return costs_of(stage.client.jobs.metrics(name), memory.peak_bytes)


def costs_of(points: Iterable[MetricPoint], peak_bytes: int) -> Costs:
    """Return what the steps after the first took, by a job's own metrics."""
    steps = [point.values for point in points][1:]
    tokens = sum(step["num_tokens"] for step in steps)
    seconds = sum(step["num_tokens"] / step["tokens_per_second"] for step in steps)
    return Costs(
        seconds_per_step=seconds / len(steps), tokens_per_second=tokens / seconds, peak_bytes=peak_bytes
    )


def model_bytes(client: Client, model: str) -> int:
    """Return the size of a model's files, those of its tokenizer left out."""
    return sum(file.size_bytes for file in client.models.files(model) if not file.tokenizer)


def estimates(evaluation: Evaluation) -> dict[str, dict[str, ScoreEstimate]]:
    """Return the scores of each arm by name."""
    return {result.arm_id: {one.score: one for one in result.scores} for result in evaluation.arm_results}


def have_learnt(evaluation: Evaluation) -> bool:
    """Say how both differ from the base, and from each other; returns whether both are better than the base."""
    both = [
        proven(
            evaluation, comparison(evaluation, RECORD_SCORE, arm, BASE), f"Whole records right, by {words}"
        )
        for arm, words in ((LORA, "an adapter"), (ALL, "all weights"))
    ]
    beside = comparison(evaluation, RECORD_SCORE, ALL, LORA)
    say(f"All weights minus the adapter: {difference_words(beside)}: {verdict_word(beside.verdict)}.")
    return all(both)


def table(
    scores: Mapping[str, Mapping[str, ScoreEstimate]],
    costs: Mapping[str, Costs],
    sizes_bytes: Mapping[str, int],
) -> str:
    """Return a table in Markdown: a column for each arm, its scores with their intervals above its costs."""
    arms = (BASE, LORA, ALL)
    rows = [["", "base", "LoRA", "full"]]
    rows += [
        [words, *(estimate_words(scores[arm][name]) for arm in arms)]
        for name, words in SCORES.items()
        if all(name in scores[arm] for arm in arms)
    ]
    spent = [costs.get(arm) for arm in arms]
    rows += [
        ["seconds a step", *("" if one is None else f"{one.seconds_per_step:.2f}" for one in spent)],
        ["tokens/s", *("" if one is None else f"{one.tokens_per_second:.0f}" for one in spent)],
        ["peak memory, GB", *("" if one is None else f"{one.peak_bytes / 1e9:.2f}" for one in spent)],
        ["model's files, MB", *(f"{sizes_bytes[arm] / 1e6:.1f}" for arm in arms)],
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(arms) + 1)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(play("Tune a small model by an adapter and by all its weights.", run, has_control=False))
