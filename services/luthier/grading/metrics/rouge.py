"""ROUGE of an answer: F1 of words, of two in a row, and of the longest common subsequence of words."""

from __future__ import annotations

from luthier.grading.metrics.said import Said
from luthier.grading.metrics.text_form import in_text_form
from luthier.grading.outcomes import GradingError
from luthier.grading.similarity import similarity

_MEASURES = {"rouge.one": "ROUGE_1", "rouge.two": "ROUGE_2", "rouge.longest": "ROUGE_L"}


def rouge(said: Said) -> dict[str, float]:
    """Return the F1s, from 0 to 1; of a reference that has one word there is no `rouge.two`.

    Raises:
        ValueError: the reference has no word.
    """
    text, reference = in_text_form(said.text), in_text_form(said.reference)
    found = {}
    for name, measure in _MEASURES.items():
        try:
            found[name] = similarity(measure, text, reference)
        except GradingError as error:
            if name != "rouge.two":
                raise ValueError(f"ROUGE: the {error}") from error
    return found
