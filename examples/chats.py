"""What the examples' data share: turns of OpenAI's chat format, and files of records."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def turn(role: str, content: str) -> dict[str, str]:
    """Return a turn."""
    return {"role": role, "content": content}


def write(path: Path, records: Iterable[Mapping[str, Any]]) -> Path:
    """Write records as JSONL, the folder made if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def every(turns: int, count: int) -> list[bool]:
    """Return `count` answers, the first yes and then one of so many."""
    return [number % turns == 0 for number in range(count)]
