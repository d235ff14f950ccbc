"""The rows of a job as recipes take them, from the files that its driver has kept them in."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow.compute

from luthier.errors import DataLoss
from luthier.training.recipe_settings import mixture_of
from luthier.training.recipes.corpus import Block, Corpus, Split, joined
from luthier.training.recipes.mixture import Mixture, row_named
from luthier.training.recipes.units import role_codes
from luthier.training.worker.order import RenderingRows, TrainOrder
from luthier.v1 import dataset_pb2, rendering_pb2
from luthier.work.limited import Check
from luthier.work.row_file import iterate_rows

_SPLITS: dict[Split, dataset_pb2.Split.ValueType] = {
    "TRAIN": dataset_pb2.SPLIT_TRAIN,
    "VALIDATION": dataset_pb2.SPLIT_VALIDATION,
}


class RowPlaces:
    """Where the rows of a rendering are from, by row. Memory: 20 bytes of each."""

    def __init__(self) -> None:
        self._batches: list[Any] = []
        self._first_rows: list[int] = []

    def add(self, batch: Any) -> None:
        """Add a record batch; batches come in ascending order of their rows."""
        if batch.num_rows and {"filename", "line"} <= set(batch.schema.names):
            self._first_rows.append(batch.column("row")[0].as_py())
            self._batches.append(_own(batch))

    def of(self, row: int) -> str:
        """Return the file and the line of a row; empty: its rendering does not say."""
        number = bisect_right(self._first_rows, row) - 1
        if number < 0:
            return ""
        batch = self._batches[number]
        place = int(np.searchsorted(batch.column("row").to_numpy(), row))
        assert batch.column("row")[place].as_py() == row, f"row {row} was not read"
        return f"{batch.column('filename')[place].as_py()}:{batch.column('line')[place].as_py()}"


def _own(batch: Any) -> Any:
    """Return a copy: a column is a view of the message that it came in, with all tokens of the rows."""
    every = pyarrow.array(np.arange(batch.num_rows))
    columns = {name: batch.column(name).take(every) for name in ("row", "filename", "line")}
    columns["filename"] = columns["filename"].dictionary_encode()
    return pyarrow.RecordBatch.from_pydict(columns)


def row_placed(row: int, mixture: Mixture | None, places: Sequence[RowPlaces]) -> str:
    """Return how people find a row: its number, its rendering where there are several, its file and line."""
    source, number = (0, row) if mixture is None else mixture.numbered(row)
    place = places[source].of(number)
    return f"{row_named(row, mixture)} ({place})" if place else row_named(row, mixture)


def read_rows(order: TrainOrder, check: Check) -> tuple[Corpus, Mixture | None, tuple[RowPlaces, ...]]:
    """Return the rows of all renderings of a job, how they are mixed, and where those of each are from.

    Raises as `read_corpus`.
    """
    places = tuple(RowPlaces() for _ in order.renderings)
    corpus, *others = [
        read_corpus(rows, check, place.add) for rows, place in zip(order.renderings, places, strict=True)
    ]
    if not others:
        return corpus, None, places
    whole, first_rows = joined([corpus, *others])
    return whole, mixture_of(order.task.train.job, first_rows), places


def read_corpus(rows: RenderingRows, check: Check, see: Callable[[Any], None] = lambda _: None) -> Corpus:
    """Return the training and validation rows of a rendering; its file goes, to leave the disk its room.

    Args:
        rows: as they were kept.
        check: called before each part of them.
        see: given each record batch, with all its columns.

    Raises:
        DataLoss: they are not as many as the rendering says, or not as they were kept.
    """
    corpus = Corpus()
    for data in iterate_rows(rows.path):
        check()
        for batch in pyarrow.ipc.open_stream(data):
            add_batch(corpus, batch)
            see(batch)
    rows.path.unlink()
    _check_counts(corpus, rows.rendering)
    return corpus


def add_batch(corpus: Corpus, batch: Any) -> None:
    """Add a record batch; tokens go from Arrow's buffers into arrays, and never through Python's numbers.

    Raises:
        DataLoss: a row lacks tokens, or has not one flag for each.
    """
    for split in _SPLITS:
        part = batch.filter(pyarrow.compute.equal(batch.column("split"), split))
        if part.num_rows == 0:
            continue
        ids, mask = part.column("input_ids"), part.column("loss_mask")
        bounds, ends = (np.asarray(column.offsets, dtype=np.int64) for column in (ids, mask))
        tokens, flags = ids.flatten(), mask.flatten()
        nulls = ids.null_count + mask.null_count + tokens.null_count + flags.null_count
        if nulls or not np.array_equal(bounds - bounds[0], ends - ends[0]):
            raise DataLoss(
                f"each row must have a flag for each token, rows from {part.column('row')[0]} on have not",
                metadata={"row": str(part.column("row")[0])},
            )
        rows = _int64(part, "row")
        block = Block(
            rows=rows,
            # A Data service of before units has none: each row is its own.
            units=_int64(part, "unit") if "unit" in part.schema.names else rows,
            bounds=bounds - bounds[0],
            input_ids=tokens.to_numpy().astype(np.int32, copy=False),
            learnt=flags.to_numpy(zero_copy_only=False),
            roles=role_codes(part.column("role").to_pylist()) if "role" in part.schema.names else None,
        )
        corpus.add(split, block)


def _int64(batch: Any, name: str) -> Any:
    return batch.column(name).to_numpy().astype(np.int64, copy=False)


def _check_counts(corpus: Corpus, rendering: rendering_pb2.Rendering) -> None:
    told = {entry.split: entry.tokens for entry in rendering.split_statistics}
    for split, number in _SPLITS.items():
        lengths = corpus.lengths(split)
        read = (len(lengths), sum(lengths.num_tokens))
        expected = (told[number].count, told[number].sum) if number in told else (0, 0)
        if read != expected:
            raise DataLoss(
                f"{rendering.name} must have {expected[0]} rows of {split} with {expected[1]} tokens, "
                f"{read[0]} with {read[1]} arrived",
                metadata={"name": rendering.name, "split": split},
            )
