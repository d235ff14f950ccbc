"""Lengths of rows as they come from the Data service."""

from __future__ import annotations

from typing import Any

import pyarrow
import pytest

from luthier.errors import DataLoss
from luthier.training.jobs.planning import SplitLengths
from luthier.training.peers import add_lengths
from luthier.training.recipes.batches import RowLength


def ipc_of(batches: list[pyarrow.RecordBatch]) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, batches[0].schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def batch_of(rows: list[tuple[int, str, int, int]]) -> Any:
    columns = dict(
        zip(("row", "split", "num_tokens", "num_supervised"), zip(*rows, strict=True), strict=True)
    )
    return pyarrow.RecordBatch.from_pydict({name: list(values) for name, values in columns.items()})


def test_add_lengths_sorts_rows_by_split_over_batches_and_chunks() -> None:
    whole = batch_of([(0, "TRAIN", 5, 2), (1, "TEST", 6, 3), (2, "VALIDATION", 7, 0), (3, "TRAIN", 8, 4)])
    lengths = SplitLengths()
    add_lengths(ipc_of([whole.slice(0, 1), whole.slice(1, 3)]), lengths)
    add_lengths(ipc_of([batch_of([(4, "TRAIN", 9, 9)])]), lengths)
    assert list(lengths.train) == [
        RowLength(row=0, num_tokens=5, num_supervised=2),
        RowLength(row=3, num_tokens=8, num_supervised=4),
        RowLength(row=4, num_tokens=9, num_supervised=9),
    ]
    assert list(lengths.validation) == [RowLength(row=2, num_tokens=7, num_supervised=0)]


def test_add_lengths_keeps_units() -> None:
    batch = batch_of([(0, "TRAIN", 5, 2), (1, "TRAIN", 6, 3), (2, "TRAIN", 7, 0)])
    lengths = SplitLengths()
    add_lengths(ipc_of([batch.append_column("unit", pyarrow.array([0, 0, 2]))]), lengths)
    assert [row.unit for row in lengths.train] == [None, 0, None]


def test_add_lengths_refuses_other_columns() -> None:
    with pytest.raises(DataLoss, match="a chunk of lengths must have the columns"):
        add_lengths(ipc_of([pyarrow.RecordBatch.from_pydict({"row": [1]})]), SplitLengths())
