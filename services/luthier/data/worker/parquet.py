"""Parquet shards, written row by row within bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

GROUP_ROWS = 1024
GROUP_BYTES = 4 << 20
SHARD_ROWS = 65_536
SHARD_BYTES = 256 << 20

_PLACE = [
    ("row", pyarrow.int64()),
    ("record_id", pyarrow.string()),
    ("split", pyarrow.string()),
    ("filename", pyarrow.string()),
    ("line", pyarrow.int64()),
]
RECORD_SCHEMA = pyarrow.schema([*_PLACE, ("record", pyarrow.string())])
"""A version's shard: one canonical record a row."""
ROW_SCHEMA = pyarrow.schema(
    [
        *_PLACE,
        ("input_ids", pyarrow.list_(pyarrow.int32())),
        ("loss_mask", pyarrow.list_(pyarrow.bool_())),
        ("num_tokens", pyarrow.int32()),
        ("num_supervised", pyarrow.int32()),
        ("unit", pyarrow.int64()),
        ("role", pyarrow.string()),
    ]
)
"""A rendering's shard: one sequence a row, and its lengths beside it so that they can be read alone.

Rows of a unit follow one another and share a forward pass: `unit` is the number of the first of them. `role` says what
a row is in its unit, and is empty where the row is all of it.
"""
PROMPT_SCHEMA = ROW_SCHEMA.append(pyarrow.field("record", pyarrow.string()))
"""A shard of prompts: beside each the canonical record, whose fields graders compare an answer with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenShard:
    """A finished file with the rows `first_row` .. `first_row + num_rows - 1`."""

    path: Path
    first_row: int
    num_rows: int


class ShardWriter:
    """Writes rows into files `<stem>-00000.parquet`, ..., numbering them in the column `row` from 0.

    Memory: one row group of at most `GROUP_ROWS` rows and about `GROUP_BYTES`. `finished` is called with each
    file once it is closed.
    """

    def __init__(
        self, folder: Path, stem: str, schema: pyarrow.Schema, finished: Callable[[WrittenShard], None]
    ) -> None:
        self._folder = folder
        self._stem = stem
        self._schema = schema
        self._finished = finished
        self._next_row = 0
        self._group: list[Mapping[str, Any]] = []
        self._group_bytes = 0
        self._file: pyarrow.parquet.ParquetWriter | None = None
        self._path = folder
        self._num_shards = 0
        self._first_row = 0
        self._shard_bytes = 0

    @property
    def num_rows(self) -> int:
        """Rows added so far."""
        return self._next_row

    def add(self, row: Mapping[str, Any], size_bytes: int) -> None:
        """Append a row (all columns but `row`) that takes about `size_bytes` in memory."""
        self._group.append({**row, "row": self._next_row})
        self._next_row += 1
        self._group_bytes += size_bytes
        if len(self._group) >= GROUP_ROWS or self._group_bytes >= GROUP_BYTES:
            self._write_group()
        if self._next_row - self._first_row >= SHARD_ROWS or self._shard_bytes >= SHARD_BYTES:
            self._finish_shard()

    def close(self) -> None:
        """Write what is left and finish the last file. Without rows there is no file."""
        self._write_group()
        self._finish_shard()

    def _write_group(self) -> None:
        if not self._group:
            return
        if self._file is None:
            self._path = self._folder / f"{self._stem}-{self._num_shards:05d}.parquet"
            self._file = pyarrow.parquet.ParquetWriter(self._path, self._schema, compression="zstd")
        self._file.write_table(
            pyarrow.Table.from_pylist(self._group, schema=self._schema), row_group_size=GROUP_ROWS
        )
        self._shard_bytes += self._group_bytes
        self._group = []
        self._group_bytes = 0

    def _finish_shard(self) -> None:
        self._write_group()
        if self._file is None:
            return
        self._file.close()
        self._file = None
        num_rows = self._next_row - self._first_row
        shard = WrittenShard(path=self._path, first_row=self._first_row, num_rows=num_rows)
        self._num_shards += 1
        self._first_row = self._next_row
        self._shard_bytes = 0
        self._finished(shard)
