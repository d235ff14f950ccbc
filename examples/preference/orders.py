"""Questions about invented orders, each with a short and a long answer. All of it is synthetic.

The same seed and sizes give the same bytes. Numbers, things and towns of the test occur in training too, but no text of
it does.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from chats import turn

THINGS = ("lamps", "chairs", "desks", "kettles", "clocks", "mirrors", "shelves", "rugs", "vases", "stools")
TOWNS = ("Oslo", "Turin", "Ghent", "Porto", "Basel", "Malmo", "Leeds", "Lyon", "Graz", "Cork")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
INSTRUCTION = "Answer the question about the order."
# One alone: of many, none would be as likely as the short answer, and a model that draws the likeliest would be short.
_OPENING = "Thank you for your question!"
_ENDINGS = (
    "Let me know if you need anything else.",
    "Have a nice day!",
    "I hope this helps.",
    "Thank you for your patience.",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A question with what it is about, and two right answers."""

    question: str
    short: str
    long: str

    @property
    def prompt(self) -> list[dict[str, str]]:
        """The turns that ask."""
        return [turn("system", INSTRUCTION), turn("user", self.question)]


def examples(count: int, *, seed: int, avoided: Iterable[str] = ()) -> list[Example]:
    """Return `count` examples, no two with the same question, and none with one that is avoided."""
    source = random.Random(seed)
    seen = set(avoided)
    found: list[Example] = []
    while len(found) < count:
        one = _draw(source)
        if one.question not in seen:
            seen.add(one.question)
            found.append(one)
    return found


def _draw(source: random.Random) -> Example:
    number, count = source.randint(1000, 9999), source.randint(2, 90)
    thing, town, day = source.choice(THINGS), source.choice(TOWNS), source.choice(DAYS)
    facts = source.choice(
        (
            f"Order {number}: {count} {thing} go to {town} on {day}.",
            f"On {day}, order {number} brings {count} {thing} to {town}.",
            f"{count} {thing} are sent to {town}, order {number}. They arrive on {day}.",
        )
    )
    asked, short, sentence = source.choice(
        (
            ("When do they arrive?", day, f"Order {number} arrives on {day}."),
            ("Where do they go?", town, f"The {thing} of order {number} go to {town}."),
            ("What is sent?", thing, f"Order {number} holds {thing} for {town}."),
            ("How many are sent?", str(count), f"There are {count} {thing} in order {number}."),
        )
    )
    long = f"{_OPENING} {sentence} {source.choice(_ENDINGS)}"
    return Example(question=f"{facts} {asked}", short=short, long=long)


def conversations(found: Iterable[Example], *, is_short: Iterable[bool]) -> Iterator[dict[str, Any]]:
    """Yield each example as a chat, with the answer that it is said to have."""
    for one, short in zip(found, is_short, strict=True):
        yield {"messages": [*one.prompt, turn("assistant", one.short if short else one.long)]}


def pairs(found: Iterable[Example], *, prefers_short: Iterable[bool]) -> Iterator[dict[str, Any]]:
    """Yield each example as a preference between its two answers."""
    for one, short in zip(found, prefers_short, strict=True):
        sides = [[turn("assistant", text)] for text in (one.short, one.long)]
        chosen, rejected = sides if short else sides[::-1]
        yield {"prompt": one.prompt, "chosen": chosen, "rejected": rejected}
