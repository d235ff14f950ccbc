"""Rows come from Arrow into the corpus as they were written, however they are cut; who waits can give up."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest

from luthier.errors import Cancelled, DataLoss
from luthier.lm.packed import WEIGHT
from luthier.training.recipes.batches import RowLength
from luthier.training.recipes.corpus import Corpus
from luthier.training.worker.renderings import store_rows
from luthier.training.worker.rows import add_batch
from luthier.work.peers import channel


def batch_of(rows: list[Any], **more: list[Any]) -> Any:
    columns = {
        name: [getattr(row, name) for row in rows] for name in ("row", "split", "input_ids", "loss_mask")
    }
    return pyarrow.RecordBatch.from_pydict({**columns, **more})


def test_add_batch_keeps_tokens_masks_and_units_of_both_splits(token_rows: Callable[..., list[Any]]) -> None:
    rows = token_rows(20)
    whole = batch_of(rows, unit=[row.row - row.row % 2 for row in rows])
    corpus = Corpus()
    for part in (whole.slice(0, 7), whole.slice(7, 1), whole.slice(8, 12)):
        add_batch(corpus, part)
    for split in ("TRAIN", "VALIDATION"):
        wanted = [row for row in rows if row.split == split]
        assert list(corpus.lengths(split)) == [
            RowLength(
                row=row.row,
                num_tokens=len(row.input_ids),
                num_supervised=sum(row.loss_mask[1:]),
                unit=row.row - 1 if row.row % 2 else None,
            )
            for row in wanted
        ]
        packed = corpus.pack([row.row for row in reversed(wanted)], split)
        assert packed.input_ids.tolist() == [token for row in reversed(wanted) for token in row.input_ids]
        assert packed.streams[WEIGHT].tolist() == [flag for row in reversed(wanted) for flag in row.loss_mask]
        assert packed.rows == tuple(row.row for row in reversed(wanted))


def test_add_batch_without_units_makes_each_row_its_own(token_rows: Callable[..., list[Any]]) -> None:
    corpus = Corpus()
    add_batch(corpus, batch_of(token_rows(6)))
    assert [row.unit for row in corpus.lengths("TRAIN")] == [None] * 5


def test_the_first_token_of_a_row_is_not_counted_as_learnt() -> None:
    batch = pyarrow.RecordBatch.from_pydict(
        {
            "row": [0, 1, 2],
            "split": ["TRAIN"] * 3,
            "input_ids": [[5, 6], [], [7]],
            "loss_mask": [[True, True], [], [True]],
        }
    )
    corpus = Corpus()
    add_batch(corpus, batch)
    assert [(row.num_tokens, row.num_supervised) for row in corpus.lengths("TRAIN")] == [
        (2, 1),
        (0, 0),
        (1, 0),
    ]


@pytest.mark.parametrize("mask", [[[True], [True, False]], [[True, None], [True]], [None, [True]]])
def test_add_batch_refuses_rows_without_a_flag_for_each_token(mask: list[Any]) -> None:
    batch = pyarrow.RecordBatch.from_pydict(
        {"row": [3, 4], "split": ["TRAIN"] * 2, "input_ids": [[1, 2], [3]], "loss_mask": mask}
    )
    with pytest.raises(DataLoss, match="a flag for each token, rows from 3 on have not"):
        add_batch(Corpus(), batch)


def test_reading_from_a_service_that_is_away_is_given_up_within_a_second(tmp_path: Path) -> None:
    stop_at = time.monotonic() + 2.0

    def check() -> None:
        if time.monotonic() > stop_at:
            raise Cancelled("nobody wants it")

    with channel("127.0.0.1:1") as opened, pytest.raises(Cancelled):
        store_rows(opened, lambda: "token", "projects/p/renderings/r", "digest", check, tmp_path / "rows")
    assert time.monotonic() - stop_at < 1.0
