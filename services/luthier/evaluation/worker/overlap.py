"""Which records of an evaluation a training record repeats: to the byte, but for their form, or by runs of words.

Runs of 13 words are those of T. Brown et al., "Language models are few-shot learners", 2020, appendix C. There one of
them is enough; here half of a record's own must stand in one training record. Its own are those that few records of the
evaluation share, and none of a system turn: an instruction or a template that all records begin with says nothing of
what was learnt. Where records ask the same under several system turns, these hold what is asked about, a text for
instance: then they are compared, and what asks is no record's own.
Memory: a number for each run of words of the evaluation's records, whatever is read of training records. Time: at most
`MOST_SHARED` steps for each run of words of a training record.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import chain

NUM_WORDS = 13
LEAST_OVERLAP = 0.5
MOST_SHARED = 20
"""Records of an evaluation that may share a run of words, if it is to count; of few a tenth, and at least two."""
_WORD = re.compile(r"[-+]?\d+(?:[.,]\d+)*|\w+|[-+*/=<>^%$€£]")
"""A number with its sign, a word, or a sign that changes what is said; other punctuation is form."""


class Kind(IntEnum):
    """How much of a record is there; the smaller the stricter."""

    EXACT = 1
    NORMALISED = 2
    NGRAM = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Words:
    """What is compared of a record: its digest, what asks, the answer, and what its system turns say."""

    record_id: str
    question: str
    answer: str
    system: str = ""


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
        self._said: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
        self.held: dict[int, Held] = {}
        forms = [_form(record) for record in records]
        self._asked_of_several = _asked_of_several(forms)
        for position, (record, form) in enumerate(zip(records, forms, strict=True)):
            self._exact[record.record_id].append(position)
            if form.words:
                self._said[form.said][form.system].append(position)
        self._runs = _own([set(_runs(self._own_words(form))) for form in forms])
        self._num_runs = Counter(position for positions in self._runs.values() for position in positions)

    def show(self, record: Words, place: Place) -> None:
        """Look at one training record."""
        form = _form(record)
        for position in self._exact.get(record.record_id, ()):
            self._hold(position, Held(kind=Kind.EXACT, overlap=1.0, place=place))
        for position in self._same_words(form):
            self._hold(position, Held(kind=Kind.NORMALISED, overlap=1.0, place=place))
        found: Counter[int] = Counter()
        for run in set(_runs(form.words)):
            found.update(self._runs.get(run, ()))
        for position, count in found.items():
            overlap = count / self._num_runs[position]
            if overlap >= LEAST_OVERLAP:
                self._hold(position, Held(kind=Kind.NGRAM, overlap=overlap, place=place))

    def _same_words(self, form: _Form) -> Iterable[int]:
        """Return the records that say the same; under the same system turn where that holds what is asked about."""
        by_system = self._said.get(form.said, {})
        if form.question in self._asked_of_several:
            return by_system.get(form.system, ())
        return chain.from_iterable(by_system.values())

    def _own_words(self, form: _Form) -> Sequence[str]:
        return form.answer if form.question in self._asked_of_several else form.words

    def _hold(self, position: int, found: Held) -> None:
        known = self.held.get(position)
        if known is None or (found.kind, -found.overlap) < (known.kind, -known.overlap):
            self.held[position] = found


@dataclass(frozen=True, slots=True, kw_only=True)
class _Form:
    question: str
    words: list[str]
    answer: list[str]
    system: str

    @property
    def said(self) -> str:
        return f"{self.question}\n{' '.join(self.answer)}"


def _form(record: Words) -> _Form:
    question, answer = _split(record.question), _split(record.answer)
    return _Form(
        question=" ".join(question),
        words=question + answer,
        answer=answer,
        system=" ".join(_split(record.system)),
    )


def _asked_of_several(forms: Iterable[_Form]) -> frozenset[str]:
    """Return the questions that are asked under several system turns, whatever is answered."""
    systems: dict[str, set[str]] = defaultdict(set)
    for form in forms:
        systems[form.question].add(form.system)
    return frozenset(question for question, found in systems.items() if len(found) > 1)


def _split(text: str) -> list[str]:
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def _own(runs_by_position: Sequence[set[int]]) -> dict[int, list[int]]:
    """Return by run of words the records that have it, without runs that many of them share."""
    most = min(MOST_SHARED, max(2, len(runs_by_position) // 10))
    found: dict[int, list[int]] = defaultdict(list)
    for position, runs in enumerate(runs_by_position):
        for run in runs:
            found[run].append(position)
    return {run: positions for run, positions in found.items() if len(positions) <= most}


def _runs(words: Sequence[str]) -> Iterator[int]:
    for start in range(len(words) - NUM_WORDS + 1):
        yield hash(tuple(words[start : start + NUM_WORDS]))
