"""Records as they are uploaded, and rows as they come back."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pyarrow

if TYPE_CHECKING:
    from collections.abc import Sequence


def lines(*values: object) -> bytes:
    return b"".join(json.dumps(value).encode() + b"\n" for value in values)


def chat(question: str, answer: str, **message: Any) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer, **message},
        ]
    }


def table(chunks: Sequence[Any]) -> Any:
    batches = [batch for chunk in chunks for batch in pyarrow.ipc.open_stream(chunk.ipc)]
    return pyarrow.Table.from_batches(batches)
