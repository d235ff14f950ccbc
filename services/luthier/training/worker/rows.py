"""The rows of a job as recipes take them, from the files that its driver has kept them in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow.compute

from luthier.errors import DataLoss
from luthier.training.recipe_settings import mixture_of
from luthier.training.recipes.corpus import Block, Corpus, Split, joined
from luthier.training.recipes.mixture import Mixture
from luthier.training.recipes.units import role_codes
from luthier.training.worker.order import RenderingRows, TrainOrder
from luthier.v1 import dataset_pb2, rendering_pb2
from luthier.work.limited import Check
from luthier.work.row_file import iterate_rows

_SPLITS: dict[Split, dataset_pb2.Split.ValueType] = {
    "TRAIN": dataset_pb2.SPLIT_TRAIN,
    "VALIDATION": dataset_pb2.SPLIT_VALIDATION,
}


def read_rows(order: TrainOrder, check: Check) -> tuple[Corpus, Mixture | None]:
    """Return the rows of all renderings of a job, and how they are mixed. Raises as `read_corpus`."""
    corpus, *others = [read_corpus(rows, check) for rows in order.renderings]
    if not others:
        return corpus, None
    whole, first_rows = joined([corpus, *others])
    return whole, mixture_of(order.task.train.job, first_rows)


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
