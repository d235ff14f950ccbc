"""Sums of one-digit numbers, each with an answer at once and one in steps. All of it is synthetic.

The same seed and sizes give the same bytes.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from itertools import accumulate, pairwise
from typing import Any

from chats import turn

Sum = tuple[int, ...]
NUM_TERMS = 4
INSTRUCTION = "Add the numbers. Answer in JSON."


def draw(count: int, *, seed: int) -> list[Sum]:
    """Return `count` sums, no two alike."""
    source = random.Random(seed)
    found: dict[Sum, None] = {}
    while len(found) < count:
        found[tuple(source.randint(2, 9) for _ in range(NUM_TERMS))] = None
    return list(found)


def at_once(terms: Sum) -> str:
    """Return the answer without steps."""
    return json.dumps({"sum": sum(terms)})


def in_steps(terms: Sum) -> str:
    """Return the answer after the sums on the way to it."""
    totals = list(accumulate(terms))
    steps = [
        f"{before}+{term}={after}" for (before, after), term in zip(pairwise(totals), terms[1:], strict=True)
    ]
    return json.dumps({"steps": steps, "sum": totals[-1]})


def conversations(found: Iterable[Sum], *, has_steps: Iterable[bool]) -> Iterator[dict[str, Any]]:
    """Yield each sum as a chat, with the answer that it is said to have."""
    for terms, steps in zip(found, has_steps, strict=True):
        answer = in_steps(terms) if steps else at_once(terms)
        question = " + ".join(map(str, terms))
        yield {"messages": [turn("system", INSTRUCTION), turn("user", question), turn("assistant", answer)]}
