"""Parts of a dataset version's train split as files: nested, chosen by a hash of seed and record, in their order."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeAlias

from luthier.v1.dataset_pb2 import (
    DATASET_FORMAT_OPENAI_CHAT,
    DATASET_FORMAT_PREFERENCE,
    DATASET_FORMAT_PROMPT_COMPLETION,
    DATASET_FORMAT_SHAREGPT_UNPAIRED,
    DATASET_FORMAT_UNPAIRED,
    DatasetFormat,
)

Format: TypeAlias = DatasetFormat.ValueType


@dataclass(frozen=True, slots=True, kw_only=True)
class _Line:
    """Where a record stands in the file of all, and by what it is chosen."""

    key: bytes
    format: Format
    offset: int
    size: int


class RecordParts:
    """Keeps records in a file, and writes parts of them. Memory: 100 bytes or so for each record.

    Args:
        folder: where the files go.
        seed: of the choice.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self._folder = folder
        self.seed = seed
        self._lines: list[_Line] = []
        self._path = folder / "all"
        self._file: BinaryIO = self._path.open("w+b")

    def __len__(self) -> int:
        return len(self._lines)

    def add(self, record_id: str, canonical: str) -> None:
        """Keep a record, given as canonical JSON."""
        found_format, line = written(canonical)
        data = line.encode() + b"\n"
        key = hashlib.sha256(f"{self.seed}/{record_id}".encode()).digest()
        offset = self._file.tell()
        self._file.write(data)
        self._lines.append(_Line(key=key, format=found_format, offset=offset, size=len(data)))

    def write(self, count: int, prefix: str) -> list[tuple[Format, Path]]:
        """Write `count` of the records; return a file for each format. A smaller part lies within a larger one."""
        last = sorted(line.key for line in self._lines)[count - 1]
        chosen = [line for line in self._lines if line.key <= last]
        made = []
        for found_format in sorted({line.format for line in chosen}):
            name = DatasetFormat.Name(found_format).removeprefix("DATASET_FORMAT_").lower()
            path = self._folder / f"{prefix}-{name}.jsonl"
            with path.open("wb") as file:
                file.writelines(self._read([line for line in chosen if line.format == found_format]))
            made.append((found_format, path))
        return made

    def close(self) -> None:
        """Close the file of all records."""
        self._file.close()

    def _read(self, lines: Sequence[_Line]) -> Iterator[bytes]:
        for line in lines:
            self._file.seek(line.offset)
            yield self._file.read(line.size)
        self._file.seek(0, 2)


def written(canonical: str) -> tuple[Format, str]:
    """Return a record's canonical JSON as a line of a format that reads as that very record."""
    values = json.loads(canonical)
    if "chosen" in values:
        if "messages" in values:
            values["prompt"] = values.pop("messages")
        return DATASET_FORMAT_PREFERENCE, json.dumps(values, ensure_ascii=False)
    if "messages" in values:
        has_label = "label" in values
        return DATASET_FORMAT_SHAREGPT_UNPAIRED if has_label else DATASET_FORMAT_OPENAI_CHAT, canonical
    return DATASET_FORMAT_UNPAIRED if "label" in values else DATASET_FORMAT_PROMPT_COMPLETION, canonical
