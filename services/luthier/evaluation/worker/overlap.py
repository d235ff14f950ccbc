"""Which records of an evaluation a training record repeats: to the byte, but for their form, or by runs of words.

Runs of 13 words are those of T. Brown et al., "Language models are few-shot learners", 2020, appendix C. There one of
them is enough; here half of a record's must stand in one training record: a phrase that all records share says nothing.
Memory: a number for each run of words of the evaluation's records, whatever is read of training records.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum

NUM_WORDS = 13
LEAST_OVERLAP = 0.5
_WORD = re.compile(r"[-+]?\d+(?:[.,]\d+)*|\w+|[-+*/=<>^%$€£]")
"""A number with its sign, a word, or a sign that changes what is said; other punctuation is form."""


class Kind(IntEnum):
    """How much of a record is there; the smaller the stricter."""

    EXACT = 1
    NORMALISED = 2
    NGRAM = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Words:
    """What is compared of a record: its digest, what asks, and the answer."""

    record_id: str
    question: str
    answer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a training record stands."""

    version: str
    filename: str
    line: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """A record of the evaluation that training records hold, and the first one that holds most of it."""

    kind: Kind
    overlap: float
    place: Place


class Overlaps:
    """Looks the records of an evaluation up among training records, which are shown one by one."""

    def __init__(self, records: Sequence[Words]) -> None:
        self._exact: dict[str, list[int]] = defaultdict(list)
        self._normalised: dict[str, list[int]] = defaultdict(list)
        self._runs: dict[int, list[int]] = defaultdict(list)
        self._num_runs: list[int] = []
        self.held: dict[int, Held] = {}
        for position, record in enumerate(records):
            words = _words(record)
            self._exact[record.record_id].append(position)
            if words:
                self._normalised[_normalised(record)].append(position)
            runs = set(_runs(words))
            self._num_runs.append(len(runs))
            for run in runs:
                self._runs[run].append(position)

    def show(self, record: Words, place: Place) -> None:
        """Look at one training record."""
        for position in self._exact.get(record.record_id, ()):
            self._hold(position, Held(kind=Kind.EXACT, overlap=1.0, place=place))
        for position in self._normalised.get(_normalised(record), ()):
            self._hold(position, Held(kind=Kind.NORMALISED, overlap=1.0, place=place))
        found: Counter[int] = Counter()
        for run in set(_runs(_words(record))):
            found.update(self._runs.get(run, ()))
        for position, count in found.items():
            overlap = count / self._num_runs[position]
            if overlap >= LEAST_OVERLAP:
                self._hold(position, Held(kind=Kind.NGRAM, overlap=overlap, place=place))

    def _hold(self, position: int, found: Held) -> None:
        known = self.held.get(position)
        if known is None or (found.kind, -found.overlap) < (known.kind, -known.overlap):
            self.held[position] = found


def _words(record: Words) -> list[str]:
    return [*_split(record.question), *_split(record.answer)]


def _split(text: str) -> list[str]:
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def _normalised(record: Words) -> str:
    return f"{' '.join(_split(record.question))}\n{' '.join(_split(record.answer))}"


def _runs(words: Sequence[str]) -> Iterator[int]:
    for start in range(len(words) - NUM_WORDS + 1):
        yield hash(tuple(words[start : start + NUM_WORDS]))
