"""BLEU of an answer as one sentence, by sacrebleu; the mean over records is not a corpus' BLEU."""

from __future__ import annotations

from luthier.grading.metrics.said import Said
from luthier.grading.metrics.text_form import in_text_form
from luthier.grading.outcomes import GradingError
from luthier.grading.similarity import similarity


def bleu(said: Said) -> dict[str, float]:
    """Return BLEU of one to four words in a row, those orders left out that the answer is too short for, from 0 to 1.

    Raises:
        ValueError: the reference has no word.
    """
    try:
        return {"bleu": similarity("BLEU", in_text_form(said.text), in_text_form(said.reference))}
    except GradingError as error:
        raise ValueError(f"BLEU: the {error}") from error
