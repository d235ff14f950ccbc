"""Tokens of an answer."""

from __future__ import annotations

from luthier.grading.metrics.said import Said


def answer_length(said: Said) -> dict[str, float]:
    """Return the tokens of an answer, without what ended it."""
    return {"answer_length": float(said.num_tokens)}
