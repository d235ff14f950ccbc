"""Numbers that are written in English words: forty-three, one hundred and ten."""

from __future__ import annotations

import re

_SMALL = (
    *(
        "zero",
        "one",
        "two",
        "three",
        "four",
        "five",
        "six",
        "seven",
        "eight",
        "nine",
        "ten",
        "eleven",
        "twelve",
    ),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_VALUES = {word: value for value, word in enumerate(_SMALL)} | {
    word: 10 * ten for ten, word in enumerate(_TENS, 2)
}
_WORD = rf"(?:{'|'.join((*_VALUES, 'hundred', 'thousand'))})"
_NUMBER = re.compile(rf"\b{_WORD}(?:(?:\s+and\s+|[\s-]+){_WORD})*\b", re.IGNORECASE)


def last_number_in_words(text: str) -> int | None:
    """Return the last number below a million that is written in words; None when there is none."""
    found = [match[0].lower() for match in _NUMBER.finditer(text)]
    return _value(re.findall(rf"\b{_WORD}\b", found[-1])) if found else None


def _value(words: list[str]) -> int:
    whole, part = 0, 0
    for word in words:
        if word == "thousand":
            whole, part = whole + max(part, 1) * 1000, 0
        elif word == "hundred":
            part = max(part, 1) * 100
        else:
            part += _VALUES[word]
    return whole + part
