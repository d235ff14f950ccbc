"""Remarks about things, and whether they are positive, with the space between prompt and answer on either side."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

Side = Literal["prompt", "answer"]
"""Whose the space is."""
_WORDS = {
    "positive": ("good", "fine", "lovely", "great", "nice", "superb", "charming", "splendid"),
    "negative": ("bad", "sad", "awful", "poor", "ugly", "dreadful", "nasty", "horrible"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Remark:
    """A remark and its label."""

    text: str
    label: str


def remarks(count: int, seed: int) -> Sequence[Remark]:
    """Invent remarks, no two alike, half of them of each label."""
    draw = random.Random(seed)
    found = []
    for number in range(count):
        label = ("positive", "negative")[number % 2]
        found.append(Remark(text=f"Item {number} is {draw.choice(_WORDS[label])}.", label=label))
    draw.shuffle(found)
    return found


def records(found: Sequence[Remark], side: Side) -> Iterator[dict[str, str]]:
    """Yield prompts and completions that are the same text, cut before or behind the space."""
    for one in found:
        before, behind = (" ", "") if side == "prompt" else ("", " ")
        yield {"prompt": f"{one.text} Label:{before}", "completion": f"{behind}{one.label}"}


def conversations(found: Sequence[Remark]) -> Iterator[dict[str, object]]:
    """Yield the same as chats."""
    for one in found:
        turns = [
            {"role": "user", "content": one.text},
            {"role": "assistant", "content": one.label},
        ]
        yield {"messages": turns}
