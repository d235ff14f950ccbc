"""The rows of a rendering in memory, 5 bytes a token, and packed batches of them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from luthier.lm.packed import WEIGHT, PackedBatch, pack
from luthier.training.recipes.survey import PackedLengths

Split = Literal["TRAIN", "VALIDATION"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Some rows, laid end to end.

    Attributes:
        rows: their numbers [n], ascending, int64.
        units: the number of the first row of each row's unit [n], int64.
        bounds: row i has the tokens from bounds[i] to bounds[i + 1] [n + 1].
        input_ids: tokens of all rows, int32.
        learnt: which of them are learnt, bool.
    """

    rows: NDArray[np.int64]
    units: NDArray[np.int64]
    bounds: NDArray[np.int64]
    input_ids: NDArray[np.int32]
    learnt: NDArray[np.bool_]


class Corpus:
    """Rows by their number in the rendering, in two splits."""

    def __init__(self) -> None:
        self._blocks: dict[Split, list[Block]] = {"TRAIN": [], "VALIDATION": []}
        self._lengths: dict[Split, PackedLengths] = {split: PackedLengths() for split in self._blocks}

    def add(self, split: Split, block: Block) -> None:
        """Add rows; blocks come in ascending order of their rows' numbers.

        The first token of a row is never learnt, as nothing comes before it to predict it from.
        """
        assert block.bounds[-1] == len(block.input_ids) == len(block.learnt), "a flag for each token"
        num_tokens = np.diff(block.bounds)
        predicted = block.learnt.copy()
        predicted[block.bounds[:-1][num_tokens > 0]] = False
        before = np.concatenate([[0], np.cumsum(predicted, dtype=np.int64)])
        lengths = self._lengths[split]
        _extend(lengths.rows, block.rows)
        _extend(lengths.units, block.units)
        _extend(lengths.num_tokens, num_tokens)
        _extend(lengths.num_supervised, before[block.bounds[1:]] - before[block.bounds[:-1]])
        self._blocks[split].append(block)

    def lengths(self, split: Split) -> PackedLengths:
        """Return the lengths of all rows of a split."""
        return self._lengths[split]

    def pack(self, rows: Sequence[int], split: Split = "TRAIN") -> PackedBatch:
        """Lay rows of a split end to end for one forward pass."""
        parts = [self._row(row, split) for row in rows]
        return pack([ids for ids, _ in parts], {WEIGHT: [learnt for _, learnt in parts]}, rows)

    def _row(self, row: int, split: Split) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        blocks = self._blocks[split]
        block = blocks[bisect_right(blocks, row, key=lambda block: int(block.rows[0])) - 1]
        place = int(np.searchsorted(block.rows, row))
        assert block.rows[place] == row, f"row {row} is not in {split}"
        tokens = slice(block.bounds[place], block.bounds[place + 1])
        return block.input_ids[tokens], block.learnt[tokens]


def _extend(column: Any, values: NDArray[Any]) -> None:
    column.frombytes(values.astype(column.typecode).tobytes())
