"""The control of what is forgotten: a model that was taught noise, and two that were taught nothing.

The suite has to tell them apart, or what it says of others is worth nothing. An adapter in steps of no size at all is
the base, bit for bit. One in steps that change no more than the last bits of what is computed says what of the suite
turns by chance.
"""

from __future__ import annotations

import random
import string
from collections.abc import Iterator
from typing import Any

import chats
from companies import Split
from stack import MODEL, Stage, before_and_after, create_dataset, create_rendering, say

from luthier.client.drift import divergence_words, retained_words, text_loss_words
from luthier.v1.evaluation_pb2 import DriftResult, Evaluation

BASE, UNTOUCHED, ROUNDED, NOISE = "base", "untouched", "rounded", "noise"
LEARNING_RATES = {UNTOUCHED: "1e-30", ROUNDED: "1e-9", NOISE: "1.5e-3"}
"""What differs between the jobs. What the first learns is lost in every sum, what the second learns in nearly every."""
NUM_TEST = 8


def run(stage: Stage) -> bool:
    """Teach all the same noise and ask them the general suite; returns whether it tells them apart."""
    num_train, max_steps, num_questions = (24, 2, 4) if stage.is_fast else (720, 45, 0)
    say("\n2  Words of random letters, as questions and as answers")
    sizes: dict[Split, int] = {"train": num_train, "test": NUM_TEST}
    folder = stage.home / "noise"
    files = {
        split: chats.write(folder / f"{split}.jsonl", records(count, seed=number))
        for number, (split, count) in enumerate(sizes.items())
    }
    version = create_dataset(stage.shell, stage.client, f"noise-{stage.stamp}", files)
    rendering = create_rendering(stage.shell, stage.client, version)

    say("\n3  The same steps three times: of no size, of next to none, and large ones")
    settings = ["--model", MODEL, "--rendering", rendering, "--max-steps", str(max_steps)]
    settings += ["--batch-tokens", "2048", "--warmup-steps", "1"]
    for arm, rate in LEARNING_RATES.items():
        words = [*settings, "--learning-rate", rate, "--name", f"{arm}-{stage.stamp}", "--watch"]
        stage.shell.luthier("jobs", "create", *words)

    say("\n4  Asked the general suite")
    limits = ["--max-records", str(NUM_TEST), "--max-new-tokens", "16", "--drift"]
    limits += ["--set", f"drift.max_questions={num_questions}"] if num_questions else []
    models = {BASE: MODEL, **{arm: f"{arm}-{stage.stamp}" for arm in LEARNING_RATES}}
    done = before_and_after(stage.shell, stage.client, version, f"noise-{stage.stamp}", models, *limits)
    for one in done.drift_results:
        said = (retained_words(one), divergence_words(one), text_loss_words(one))
        say(f"{one.arm_id:>10}: retained {said[0]}; divergence {said[1]}; general text {said[2]}")
    return are_told_apart(done)


def records(count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Yield chats in which neither side says anything: words of random letters."""
    source = random.Random(f"noise-{seed}")
    words = ["".join(source.choices(string.ascii_lowercase, k=source.randint(2, 8))) for _ in range(400)]
    for _ in range(count):
        asked, said = (" ".join(source.choices(words, k=source.randint(5, 25))) for _ in range(2))
        yield {"messages": [chats.turn("user", asked), chats.turn("assistant", said)]}


def are_told_apart(evaluation: Evaluation) -> bool:
    """Say whether the untouched model has kept all, and the one that was taught noise less than either for sure."""
    found: dict[str, DriftResult] = {one.arm_id: one for one in evaluation.drift_results}
    kept, turned, lost = (found[arm].retained for arm in LEARNING_RATES)
    apart = kept.value == 1 and lost.upper < min(kept.lower, turned.lower)
    say(
        f"The suite {'tells' if apart else 'does not tell'} a model that was taught noise from one that was not."
    )
    return apart
