"""How much two texts are alike: the measures of `text_similarity`, each from 0 to 1.

BLEU is sacrebleu's, distances and common subsequences are rapidfuzz's. What only counts runs of words stands here and
is held by tests against the values of NLTK (GLEU) and of Google's rouge-score (ROUGE): the one takes seconds and 100 MB
to import, the other is not kept any more and drops every letter that is not ASCII.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from luthier.errors import Reason
from luthier.grading.outcomes import GradingError

_GLEU_ORDER = 4
_WORD = re.compile(r"[^\W_]++")


def similarity(measure: str, text: str, reference: str) -> float:
    """Return how much a text is like its reference, by a measure of `MEASURES`, in [0, 1].

    Raises:
        GradingError: GRADER_INPUT_INVALID, the reference has nothing that could be found again.
    """
    value = MEASURES[measure](text, reference)
    # Rounding makes 1.0000000000000004 of sacrebleu's 100.
    return min(1.0, max(0.0, value))


def load_libraries() -> None:
    """Import now what measures import when they are first used.

    For a process that is about to lose the right to write files: sacrebleu looks for a temporary folder when imported.
    """
    for measure in MEASURES.values():
        measure("a b c d e", "a b c d e")


def _fuzzy_match(text: str, reference: str) -> float:
    from rapidfuzz import fuzz

    return fuzz.ratio(text, reference) / 100


def _bleu(text: str, reference: str) -> float:
    _require_words(bool(reference.strip()))
    return float(_bleu_metric().sentence_score(text, [reference]).score) / 100


def _gleu(text: str, reference: str) -> float:
    """Return Google's BLEU: right runs of one to four words by the greater of how many there are and should be.

    Source: Wu et al., "Google's Neural Machine Translation System", 2016, section 8.1; words as BLEU's.
    """
    found, wanted = (_translation_words(one) for one in (text, reference))
    _require_words(bool(wanted))
    orders = range(1, _GLEU_ORDER + 1)
    num_right = sum(_num_common(_runs(found, order), _runs(wanted, order)) for order in orders)
    num_most = max(sum(max(0, len(words) - order + 1) for order in orders) for words in (found, wanted))
    return num_right / num_most


def _rouge(order: int) -> Callable[[str, str], float]:
    def measured(text: str, reference: str) -> float:
        found, wanted = (_runs(_words(one), order) for one in (text, reference))
        _require_words(bool(wanted), f"{order} words in a row" if order > 1 else "a word")
        return _f1(_num_common(found, wanted), found.total(), wanted.total())

    return measured


def _rouge_l(text: str, reference: str) -> float:
    from rapidfuzz.distance import LCSseq

    found, wanted = _words(text), _words(reference)
    _require_words(bool(wanted))
    return _f1(LCSseq.similarity(found, wanted), len(found), len(wanted))


MEASURES: Mapping[str, Callable[[str, str], float]] = {
    "FUZZY_MATCH": _fuzzy_match,
    "BLEU": _bleu,
    "GLEU": _gleu,
    **{f"ROUGE_{order}": _rouge(order) for order in range(1, 6)},
    "ROUGE_L": _rouge_l,
}
"""By the name in the API."""


def _f1(num_common: float, num_found: int, num_wanted: int) -> float:
    if not num_common:
        return 0.0
    precision, recall = num_common / num_found, num_common / num_wanted
    return 2 * precision * recall / (precision + recall)


def _words(text: str) -> list[str]:
    """Return the words as ROUGE sees them: runs of letters and digits, small."""
    return _WORD.findall(text.lower())


def _translation_words(text: str) -> list[str]:
    return str(_bleu_tokenizer()(text)).split()


def _runs(words: Sequence[str], order: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(words[start:] for start in range(order)), strict=False))


def _num_common(found: Counter[tuple[str, ...]], wanted: Counter[tuple[str, ...]]) -> int:
    return (found & wanted).total()


def _require_words(has_some: bool, what: str = "a word") -> None:
    if not has_some:
        raise GradingError(Reason.GRADER_INPUT_INVALID, f"reference must have {what}, it has not")


@cache
def _bleu_metric() -> Any:
    from sacrebleu.metrics.bleu import BLEU

    # Without effective_order a sentence of three words, having no four in a row, would be worth next to nothing.
    return BLEU(effective_order=True)


@cache
def _bleu_tokenizer() -> Any:
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    tokenizer: Any = Tokenizer13a
    return tokenizer()
