"""The general suite: questions that have nothing to do with what anybody tunes for, each with its own grader.

What a tuned model still gets right of what its base got right says what was kept. The questions are this project's own.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Any

from luthier.grading.metrics.text_form import in_text_form
from luthier.grading.number_texts import last_number
from luthier.grading.number_words import last_number_in_words
from luthier.grading.refusals import is_refusal

SKILLS = ("facts", "arithmetic", "grammar", "instructions", "refusals")
OF_A_VERSION = "questions"
"""The one skill of questions that are records of a dataset version."""
_FILE = Path(__file__).parent / "general_suite.jsonl"
_TEXTS = Path(__file__).parent / "general_texts.txt"
_FLAGS = re.IGNORECASE | re.DOTALL
_NO_NUMBER_OF_THEIR_OWN = re.compile(r"(?<=\d):00\b|\d[\d.,]*\s*%")
"""Minutes of a full hour, and shares."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """A question of the suite, with one grader: exact answers, a number, a refusal, or an expression.

    Attributes:
        skill: one of `SKILLS`.
        prompt: what is asked, in one turn.
        reference: an answer that is right.
        exact: answers that are right, but for case and for what is no letter or digit at both ends.
        number: what the last number of a right answer is, in digits, or in words where it has no digits.
        refused: whether a right answer refuses.
        regex: what a right answer holds, whatever its case; among `refusals` no answer that refuses is right by it.
    """

    skill: str
    prompt: str
    reference: str
    exact: tuple[str, ...] = ()
    number: int | None = None
    refused: bool = False
    regex: str = ""

    def is_right(self, answer: str) -> bool:
        """Whether an answer is right."""
        if self.exact:
            return _bare(answer) in {_bare(one) for one in self.exact}
        if self.number is not None:
            return _last_number(answer) == self.number
        if self.refused or (self.skill == "refusals" and is_refusal(answer)):
            return self.refused and is_refusal(answer)
        return re.search(self.regex, in_text_form(answer), _FLAGS) is not None


@cache
def general_suite() -> tuple[Item, ...]:
    """Return all questions, always in the same order."""
    return tuple(_items())


@cache
def general_texts() -> tuple[str, ...]:
    """Return paragraphs of general text, of which a model should not become less sure."""
    return tuple(_TEXTS.read_text(encoding="utf-8").strip().split("\n\n"))


def _items() -> Iterator[Item]:
    for line in _FILE.read_text(encoding="utf-8").splitlines():
        found: dict[str, Any] = json.loads(line)
        yield Item(**{**found, "exact": tuple(found.get("exact", ()))})


def _last_number(answer: str) -> Decimal | int | None:
    plain = _NO_NUMBER_OF_THEIR_OWN.sub(" ", in_text_form(answer))
    found = last_number(plain)
    return last_number_in_words(plain) if found is None else found


def _bare(text: str) -> str:
    """Return a text in lower case, without what is neither letter nor digit at both ends, words one space apart."""
    folded = " ".join(in_text_form(text).casefold().replace("’", "'").split())
    kept = [place for place, character in enumerate(folded) if unicodedata.category(character)[0] in "LN"]
    return folded[kept[0] : kept[-1] + 1] if kept else ""
