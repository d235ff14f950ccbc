"""Exact match of a text with its reference."""

from __future__ import annotations


def exact_match(prediction: str, reference: str) -> float:
    """Return 1.0 when the texts are equal, white space at both ends aside, else 0.0."""
    return float(prediction.strip() == reference.strip())
