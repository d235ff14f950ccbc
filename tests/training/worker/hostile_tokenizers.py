"""Tokenizers of a few lines that never come to an end, as somebody's model may have them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LINES = 20_000


def many_tokens() -> dict[str, Any]:
    """Writes 20,000 times 20,000 tokens before each text: some 20 GB."""
    special = {"SpecialToken": {"id": "s", "type_id": 0}}
    texts = [{"Sequence": {"id": letter, "type_id": 0}} for letter in "AB"]
    written = {"s": {"id": "s", "ids": [1] * LINES, "tokens": ["s"] * LINES}}
    return {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [special] * LINES + texts[:1],
            "pair": texts,
            "special_tokens": written,
        }
    }


def many_looks() -> dict[str, Any]:
    """Makes a long text of each, and looks from each of its letters on to its end."""
    longer = {"type": "Replace", "pattern": {"String": "e"}, "content": "x" * 50_000}
    looking = {"type": "Replace", "pattern": {"Regex": "x+z"}, "content": "y"}
    return {"normalizer": {"type": "Sequence", "normalizers": [longer, looking]}}


HOSTILE = {"memory": many_tokens, "processor": many_looks}
"""By what they take too much of."""


def make_hostile(folder: Path, name: str) -> None:
    """Give the tokenizer of a model's folder a part that takes too much."""
    stored = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**stored, **HOSTILE[name]()}))
