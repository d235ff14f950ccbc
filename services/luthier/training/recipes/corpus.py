"""The rows of a rendering in memory, 5 bytes a token, and packed batches of them."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np

from luthier.lm.packed import WEIGHT, PackedBatch, pack
from luthier.training.recipes.batches import RowLength

Split = Literal["TRAIN", "VALIDATION"]


class Corpus:
    """Rows by their number in the rendering, in two splits."""

    def __init__(self) -> None:
        self._input_ids: dict[int, array[int]] = {}
        self._supervised: dict[int, bytes] = {}
        self._lengths: dict[Split, list[RowLength]] = {"TRAIN": [], "VALIDATION": []}

    def add(self, row: int, split: Split, input_ids: Iterable[int], supervised: Iterable[bool]) -> None:
        """Add a row; rows come in ascending order of their numbers.

        The first token is never learnt, as nothing comes before it to predict it from.
        """
        tokens = array("i", input_ids)
        flags = bytes(supervised)
        assert len(tokens) == len(flags), f"row {row} has {len(tokens)} tokens and {len(flags)} flags"
        self._input_ids[row] = tokens
        self._supervised[row] = flags
        length = RowLength(row=row, num_tokens=len(tokens), num_supervised=flags[1:].count(1))
        self._lengths[split].append(length)

    def lengths(self, split: Split) -> Sequence[RowLength]:
        """Return the lengths of all rows of a split."""
        return self._lengths[split]

    def pack(self, rows: Sequence[int]) -> PackedBatch:
        """Lay rows end to end for one forward pass."""
        supervised = [np.frombuffer(self._supervised[row], dtype=np.uint8) for row in rows]
        return pack(
            [np.frombuffer(self._input_ids[row], dtype=np.int32) for row in rows], {WEIGHT: supervised}, rows
        )
