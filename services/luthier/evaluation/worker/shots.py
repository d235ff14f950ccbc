"""Worked examples before questions: the same ones for all, chosen by the seed, or for each those most like it."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from luthier.errors import FailedPrecondition, Reason
from luthier.evaluation.worker.questions import Question, Shots
from luthier.text.records import SYSTEM_ROLES, ChatRecord, SingleRecord
from luthier.v1 import evaluation_pb2

MAX_CANDIDATES = 20_000
"""Records of the train split, chosen by the seed where it has more, among which similar ones are looked for."""
_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u0e00-\u0e7f"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")
"""A word, or one sign of a script that writes no spaces between them."""


def require_enough(arms: Sequence[evaluation_pb2.EvaluationArm], num_records: int) -> None:
    """Raise FailedPrecondition WRONG_STATE where an arm wants more examples than there are records."""
    wanted = max((arm.num_shots for arm in arms), default=0)
    if num_records < wanted:
        raise FailedPrecondition(
            f"an arm wants {wanted} examples, the train split has {num_records} records",
            reason=Reason.WRONG_STATE,
        )


def same_for_all(examples: Sequence[SingleRecord]) -> Shots:
    """Return what puts these examples before every question."""
    return lambda _: examples


class Similar:
    """Finds those records that are most like a question by BM25 over words of what is asked.

    A candidate that asks the same, case, form and space between words aside, is never taken, however it is answered;
    two that ask the same are taken once. Equal scores are put in an order by the seed. What is found of a question
    depends on it, the candidates and the seed alone.

    Source: S. Robertson and H. Zaragoza, "The probabilistic relevance framework: BM25 and beyond", 2009; bm25s's scores
    (Lucene's variant, k1 1.5, b 0.75).

    Args:
        candidates: records of the train split.
        most: examples before a question at most.
        seed: of the evaluation.
    """

    def __init__(self, candidates: Sequence[Question], most: int, seed: int) -> None:
        self._most = most
        self._candidates = sorted(candidates, key=lambda one: _order(one, seed))
        texts = [_asked(one.record) for one in self._candidates]
        self._forms = [_form(text) for text in texts]
        self._scores = _scorer([_words(text) for text in texts])
        self._found: dict[int, list[SingleRecord]] = {}

    def shots(self, count: int) -> Shots:
        """Return what puts the `count` most similar examples before a question, the most similar one next to it."""
        return lambda question: self._of(question)[:count][::-1]

    def _of(self, question: Question) -> list[SingleRecord]:
        if question.row not in self._found:
            self._found[question.row] = self._look_up(question)
        return self._found[question.row]

    def _look_up(self, question: Question) -> list[SingleRecord]:
        """Raises FailedPrecondition WRONG_STATE where too few candidates are left."""
        import numpy as np

        text = _asked(question.record)
        ranked = np.argsort(-self._scores(_words(text)), kind="stable")
        seen, found = {_form(text)}, list[SingleRecord]()
        for position in ranked.tolist():
            candidate = self._candidates[position]
            if self._forms[position] in seen or candidate.record_id == question.record_id:
                continue
            if isinstance(candidate.record, ChatRecord) != isinstance(question.record, ChatRecord):
                continue
            seen.add(self._forms[position])
            found.append(candidate.record)
            if len(found) == self._most:
                return found
        raise FailedPrecondition(
            f"{question.place}: an arm wants {self._most} similar examples, the {len(self._candidates):,} records of "
            f"the train split that were looked at have {len(found)} that ask something else than the record and each "
            "other",
            reason=Reason.WRONG_STATE,
        )


def _scorer(documents: Sequence[list[str]]) -> Callable[[list[str]], Any]:
    """Return what gives each document its score for the words of a question."""
    import numpy as np

    if not any(documents):
        return lambda _: np.zeros(len(documents))
    import bm25s

    index = bm25s.BM25(k1=1.5, b=0.75, method="lucene")
    index.index(list(documents), show_progress=False)

    def scores(words: list[str]) -> Any:
        known = [word for word in words if word in index.vocab_dict]
        return index.get_scores(known) if known else np.zeros(len(documents))

    return scores


def _asked(record: SingleRecord) -> str:
    """Return what a record asks: all turns before its answer but those of the system, which most records share."""
    if not isinstance(record, ChatRecord):
        return record.prompt
    return "\n".join(_turns(record))


def _turns(record: ChatRecord) -> Iterator[str]:
    for message in record.messages[:-1]:
        if message.role not in SYSTEM_ROLES:
            yield message.content


def _words(text: str) -> list[str]:
    return _WORD.findall(_folded(text))


def _form(text: str) -> str:
    return " ".join(_folded(text).split())


def _folded(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()


def _order(candidate: Question, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}/{candidate.record_id}".encode()).digest()
