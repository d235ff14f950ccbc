"""Tokens that stand before an answer: what of the context window asking takes, examples among it."""

from __future__ import annotations

from luthier.grading.metrics.said import Said


def prompt_tokens(said: Said) -> dict[str, float]:
    """Return the tokens of a whole prompt, however many of them are shared with others and read once."""
    return {"prompt_tokens": float(said.num_prompt_tokens)}
