"""Exact match of a text with its reference."""

from __future__ import annotations

from luthier.grading.metrics.text_form import in_text_form


def exact_match(prediction: str, reference: str) -> float:
    """Return 1.0 when the texts are equal in one Unicode form, white space at both ends aside, else 0.0."""
    return float(in_text_form(prediction).strip() == in_text_form(reference).strip())
