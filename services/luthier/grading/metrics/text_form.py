"""The one Unicode form that texts are compared in."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from typing import Final

TEXT_FORM: Final = "NFC"
_SHORT_CHARACTERS = 1024


def in_text_form(text: str) -> str:
    """Return a text in `TEXT_FORM`, in time linear in its length but for sorting.

    NFC joins what Unicode defines to be the same text (UAX 15): a letter and its accent, in one character or in two.
    NFKC would join what only looks alike as well, and call answers right that are wrong: 10² and 102, ½ and 1⁄2.
    """
    if text.isascii():
        return text
    # The library moves combining marks to their place one by one: a long run of them takes quadratic time.
    ordered = text if len(text) <= _SHORT_CHARACTERS else "".join(_ordered(text))
    return unicodedata.normalize(TEXT_FORM, ordered)


def _ordered(text: str) -> Iterator[str]:
    """Yield the characters decomposed, runs of combining marks in canonical order."""
    marks: list[str] = []
    for start in range(0, len(text), _SHORT_CHARACTERS):
        for character in unicodedata.normalize("NFD", text[start : start + _SHORT_CHARACTERS]):
            if unicodedata.combining(character):
                marks.append(character)
                continue
            yield from sorted(marks, key=unicodedata.combining)
            marks.clear()
            yield character
    yield from sorted(marks, key=unicodedata.combining)
