"""What is asked is what was taught, on a real model: wherever a space stands, and with a template of one's own.

The same remarks are taught thrice: with the space between prompt and answer at the end of the prompt, where most
tokenizers would join it with the answer's first word; at the beginning of the answer; and as chats by a template of
one's own that the base model has never seen and that ends turns with another token. Each time the tuned model answers
held-out remarks beside its base. Exit status 0 only if each beats its base for sure, both sides of the space answer
alike within 10 points, and the own template's prompts are the very tokens that were taught: asked by `generate`, and
written by `AutoTokenizer` from what is downloaded, which names every token that ends an answer.

    make example NAME=boundaries [FAST=1]

Writes what it found to `boundaries.json` in its home, and as its last line before the time.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from boundaries.labels import Remark, Side, conversations, records, remarks
from chats import write
from stack import (
    MODEL,
    Stage,
    before_and_after,
    comparison,
    create_dataset,
    create_rendering,
    play,
    proven,
    rates,
    say,
)

from luthier.v1.chat_pb2 import ChatMessage
from luthier.v1.dataset_pb2 import SPLIT_TRAIN

SCORE = "exact_match"
NEAR = 0.1
LEARNT = 0.75
"""Of two labels that are guessed half are right."""
OWN = (
    "{% for message in messages %}({{ message['role'] }}) {{ message['content'] }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}(assistant) {% endif %}"
)
Way = Side | Literal["template"]
WAYS: tuple[Way, ...] = ("prompt", "answer", "template")


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """How many remarks to spend, and how often each is read."""

    train: int
    test: int
    epochs: int


FULL = Budget(train=96, test=32, epochs=20)
FAST = Budget(train=12, test=4, epochs=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """Shares of right answers of a tuned model and of its base, and the paired interval of their difference."""

    tuned: float
    base: float
    difference: float
    lower: float
    upper: float
    count: int
    is_proven: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """A prompt's tokens as they were taught, as they are written from the download, and how many were asked.

    `ends` are the tokens that end an answer here, `ends_taken_away` those that the download names.
    """

    taught: Sequence[int]
    written: Sequence[int]
    num_asked: int
    ends: Sequence[int]
    ends_taken_away: Sequence[int]

    @property
    def are_the_same(self) -> bool:
        """Whether what is asked is what was taught, here and elsewhere."""
        same = self.taught == self.written and len(self.taught) == self.num_asked
        return same and set(self.ends) <= set(self.ends_taken_away)


def run(stage: Stage) -> bool:
    """Teach the remarks in each way; returns whether each is asked as it was taught."""
    budget = FAST if stage.is_fast else FULL
    drawn = remarks(budget.train + budget.test, seed=0)
    splits = {"train": drawn[: budget.train], "test": drawn[budget.train :]}
    found: dict[Way, Found] = {}
    for number, way in enumerate(WAYS, 2):
        say(f"\n{number}  {_described(way)}")
        found[way] = taught_and_asked(stage, way, write_files(stage.home, way, splits), budget.epochs)
    say("\n5  The tokens of the own template: taught, asked, taken away")
    tokens = tokens_of(stage, f"template-{stage.stamp}", splits["train"][0])
    document = {
        "model": MODEL,
        "budget": asdict(budget),
        "answers": {way: asdict(one) for way, one in found.items()},
        "tokens": asdict(tokens),
    }
    (stage.home / "boundaries.json").write_text(json.dumps(document, indent=2) + "\n")
    say(json.dumps(document))
    return is_shown(found, tokens)


def is_shown(found: Mapping[Way, Found], tokens: Tokens) -> bool:
    """Whether every way of teaching won, the two sides of a space are alike, and prompts are what was taught."""
    alike = abs(found["prompt"].tuned - found["answer"].tuned) <= NEAR
    learnt = all(one.is_proven and one.tuned >= LEARNT for one in found.values())
    return alike and learnt and tokens.are_the_same


def write_files(home: Path, way: Way, splits: Mapping[str, Sequence[Remark]]) -> dict[str, Path]:
    """Write the remarks of each split as they are taught."""
    files = {}
    for split, part in splits.items():
        made: Iterator[Mapping[str, object]] = (
            conversations(part) if way == "template" else records(part, way)
        )
        files[split] = write(home / "boundaries" / f"{way}-{split}.jsonl", made)
    return files


def taught_and_asked(stage: Stage, way: str, files: Mapping[str, Path], epochs: int) -> Found:
    """Tune on the training remarks and ask the tuned model and its base the others."""
    shell, client, name = stage.shell, stage.client, f"{way}-{stage.stamp}"
    version = create_dataset(shell, client, name, files)
    template = stage.home / "boundaries" / "own.jinja"
    template.write_text(OWN)
    options = ["--chat-template", str(template)] if way == "template" else []
    rendering = create_rendering(shell, client, version, *options)
    shell.luthier("renderings", "preview", rendering, "--limit", "1")
    settings = ["--batch-tokens", "512", "--learning-rate", "1e-3", "--epochs", str(epochs)]
    shell.luthier(
        "jobs", "create", "--model", MODEL, "--rendering", rendering, *settings, "--name", name, "--watch"
    )
    asked = ["--metric", "exact-match", "--max-new-tokens", "8"]
    if way == "template":
        asked += ["--template", "base=taught"]
    models = {"base": MODEL, "tuned": name}
    evaluation = before_and_after(shell, client, version, name, models, *asked)
    against = comparison(evaluation, SCORE, "tuned", "base")
    is_proven = proven(evaluation, against, "Labels that are right")
    rate = rates(evaluation, SCORE)
    return Found(
        tuned=rate["tuned"],
        base=rate["base"],
        difference=against.difference,
        lower=against.lower,
        upper=against.upper,
        count=against.count,
        is_proven=is_proven,
    )


def tokens_of(stage: Stage, tuned: str, remark: Remark) -> Tokens:
    """Compare the tokens of the first training remark's prompt with those that are asked, here and from a download."""
    from transformers import AutoTokenizer, GenerationConfig

    client, folder = stage.client, stage.home / "boundaries" / tuned
    model = client.models.get(tuned)
    rows = client.renderings.preview(model.taught.rendering, split=SPLIT_TRAIN)
    tokens = list(next(row for row in rows if row.line == 1).tokens)
    first = next(place for place, token in enumerate(tokens) if token.supervised)
    turns = [ChatMessage(role="user", content=remark.text)]
    last = list(client.generate(tuned, turns, max_new_tokens=4))[-1]
    client.models.download(tuned, folder)
    written: Any = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        [{"role": "user", "content": remark.text}], add_generation_prompt=True, return_dict=False
    )
    named = GenerationConfig.from_pretrained(folder).eos_token_id
    ends = {*client.models.get(MODEL).eos_token_ids, *model.taught.stop_token_ids}
    return Tokens(
        taught=[token.token_id for token in tokens[:first]],
        written=list(written),
        num_asked=last.num_prompt_tokens,
        ends=sorted(ends),
        ends_taken_away=sorted(named if isinstance(named, list) else [named]),
    )


def _described(way: str) -> str:
    return {
        "prompt": "Taught with the space at the end of the prompt",
        "answer": "Taught with the space at the beginning of the answer",
        "template": "Taught as chats, by a template of its own",
    }[way]


if __name__ == "__main__":
    description = "Teach a small model the same in three ways, and ask it as it was taught."
    sys.exit(play(description, run, has_control=False))
