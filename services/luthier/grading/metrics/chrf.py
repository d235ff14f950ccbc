"""chrF2 of an answer: runs of one to six characters that it shares with its reference, recall weighing twice.

Source: M. Popović, "chrF: character n-gram F-score for automatic MT evaluation", WMT 2015; sacrebleu's.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from luthier.grading.metrics.said import Said
from luthier.grading.metrics.text_form import in_text_form


def chrf(said: Said) -> dict[str, float]:
    """Return sacrebleu's chrF2 of an answer, from 0 to 1.

    Raises:
        ValueError: the reference has no character to be found again.
    """
    reference = in_text_form(said.reference)
    if not reference.strip():
        raise ValueError("the reference must have a character for chrF, it has none")
    score = _metric().sentence_score(in_text_form(said.text), [reference]).score
    # Rounding makes 100.00000000000001 of some.
    return {"chrf": min(1.0, max(0.0, float(score) / 100))}


@cache
def _metric() -> Any:
    from sacrebleu.metrics.chrf import CHRF

    return CHRF()
