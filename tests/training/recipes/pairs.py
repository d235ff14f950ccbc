"""Corpora of pairs and of single answers, for a model of 97 words."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from luthier.lm.packed import PackedBatch
from luthier.training.recipes.corpus import Block, Corpus, Split
from luthier.training.recipes.units import CHOSEN, DESIRABLE, MISMATCHED, REJECTED, UNDESIRABLE, role_codes

Example = tuple[str, list[int], list[int]]
"""Role, prompt and answer of a row."""


def corpus_of_units(units: Sequence[tuple[Split, Sequence[Example]]]) -> Corpus:
    """Rows are numbered through; each unit has the number of its first row."""
    corpus, row = Corpus(), 0
    for split, examples in units:
        ids = [prompt + answer for _, prompt, answer in examples]
        learnt = [[False] * len(prompt) + [True] * len(answer) for _, prompt, answer in examples]
        block = Block(
            rows=np.arange(row, row + len(examples)),
            units=np.full(len(examples), row),
            bounds=np.cumsum([0, *map(len, ids)]),
            input_ids=np.concatenate([np.array(one, dtype=np.int32) for one in ids]),
            learnt=np.concatenate([np.array(one) for one in learnt]),
            roles=role_codes([role for role, _, _ in examples]),
        )
        corpus.add(split, block)
        row += len(examples)
    return corpus


def pairs(count: int, *, seed: int = 0, validation_every: int = 5) -> Corpus:
    """Pairs that can be learnt: a song is chosen, noise is rejected; answers of differing lengths."""
    draw = random.Random(seed)
    units: list[tuple[Split, list[Example]]] = []
    for number in range(count):
        prompt = [draw.randrange(3, 20) for _ in range(draw.randint(2, 8))]
        song = [30 + place % 3 for place in range(draw.randint(2, 6))]
        noise = [draw.randrange(40, 90) for _ in range(draw.randint(2, 7))]
        split: Split = "VALIDATION" if number % validation_every == validation_every - 1 else "TRAIN"
        units.append((split, [(CHOSEN, prompt, song), (REJECTED, prompt, noise)]))
    return corpus_of_units(units)


def unpaired(count: int, *, seed: int = 0, validation_every: int = 5) -> Corpus:
    """Single answers that can be learnt, each with the next prompt's answer beside it."""
    draw = random.Random(seed)
    made = []
    for number in range(count):
        kind = DESIRABLE if number % 3 else UNDESIRABLE
        prompt = [draw.randrange(3, 20) for _ in range(draw.randint(2, 8))]
        song = [30 + place % 3 for place in range(draw.randint(2, 6))]
        noise = [draw.randrange(40, 90) for _ in range(draw.randint(2, 7))]
        made.append((kind, prompt, song if kind == DESIRABLE else noise))
    units: list[tuple[Split, list[Example]]] = []
    for number, (kind, prompt, answer) in enumerate(made):
        other = made[(number + 1) % count][2]
        split: Split = "VALIDATION" if number % validation_every == validation_every - 1 else "TRAIN"
        units.append((split, [(kind, prompt, answer), (MISMATCHED, prompt, other)]))
    return corpus_of_units(units)


def put_word(monkeypatch: pytest.MonkeyPatch, corpus: Corpus, bad: int, word: int) -> None:
    """Have a row begin with a word in every batch that it is packed in."""
    pack = corpus.pack

    def pack_with_word(rows: Sequence[int], *split: Any) -> PackedBatch:
        batch = pack(rows, *split)
        if bad in rows:
            batch.input_ids[batch.cu_seqlens[rows.index(bad)]] = word
        return batch

    monkeypatch.setattr(corpus, "pack", pack_with_word)
