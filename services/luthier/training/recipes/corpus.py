"""The rows of a rendering in memory, 5 bytes a token and 4 more for each stream, and packed batches of them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from luthier.lm.packed import WEIGHT, PackedBatch, pack
from luthier.training.recipes.batches import Unit
from luthier.training.recipes.survey import PackedLengths, first_rows
from luthier.training.recipes.units import ROLES

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
        roles: what each row is in its unit [n], as its place in `ROLES`; None: each is all of its unit.
    """

    rows: NDArray[np.int64]
    units: NDArray[np.int64]
    bounds: NDArray[np.int64]
    input_ids: NDArray[np.int32]
    learnt: NDArray[np.bool_]
    roles: NDArray[np.int8] | None = None


@dataclass(slots=True)
class _Held:
    """A block, and what was found out about its tokens: one float32 for each, by stream."""

    block: Block
    streams: dict[str, NDArray[np.float32]] = field(default_factory=dict)


class Corpus:
    """Rows by their number in the rendering, those of several numbered through, in two splits."""

    def __init__(self) -> None:
        self._held: dict[Split, list[_Held]] = {"TRAIN": [], "VALIDATION": []}
        self._lengths: dict[Split, PackedLengths] = {split: PackedLengths() for split in self._held}

    def add(self, split: Split, block: Block) -> None:
        """Add rows; blocks come in ascending order of their rows' numbers.

        The first token of a row is never learnt, as nothing comes before it to predict it from.
        """
        assert block.bounds[-1] == len(block.input_ids) == len(block.learnt), "a flag for each token"
        assert block.roles is None or len(block.roles) == len(block.rows), "a role for each row"
        num_tokens = np.diff(block.bounds)
        predicted = block.learnt.copy()
        predicted[block.bounds[:-1][num_tokens > 0]] = False
        before = np.concatenate([[0], np.cumsum(predicted, dtype=np.int64)])
        lengths = self._lengths[split]
        _extend(lengths.rows, block.rows)
        _extend(lengths.units, block.units)
        _extend(lengths.num_tokens, num_tokens)
        _extend(lengths.num_supervised, before[block.bounds[1:]] - before[block.bounds[:-1]])
        self._held[split].append(_Held(block))

    def extend(self, other: Corpus, first_row: int) -> None:
        """Add the rows of another rendering, numbered on from `first_row`; their tokens are shared, not copied."""
        for split, blocks in other._held.items():
            for held in blocks:
                rows, units = held.block.rows + first_row, held.block.units + first_row
                self.add(split, replace(held.block, rows=rows, units=units))

    def expect_answers(self, max_new_tokens: int) -> None:
        """Count each row from now on as a prompt with the longest answer that may be sampled to it, which is learnt."""
        self._lengths = {
            split: lengths.with_answers(max_new_tokens) for split, lengths in self._lengths.items()
        }

    def tokens(self, row: int, split: Split = "TRAIN") -> tuple[int, ...]:
        """Return the token ids of a row of a split."""
        held, place = self._find(row, split)
        return tuple(held.block.input_ids[slice(*held.block.bounds[place : place + 2])].tolist())

    def rows(self, split: Split, sizes: Container[int] | None = None) -> Iterator[tuple[int, bytes]]:
        """Yield the rows of a split that have tokens, each with their bytes (int32); of some numbers of bytes alone."""
        for held in self._held[split]:
            block = held.block
            num_bytes = (np.diff(block.bounds) * block.input_ids.itemsize).tolist()
            for place, size in enumerate(num_bytes):
                if size and (sizes is None or size in sizes):
                    tokens = block.input_ids[slice(*block.bounds[place : place + 2])]
                    yield int(block.rows[place]), tokens.tobytes()

    def lengths(self, split: Split) -> PackedLengths:
        """Return the lengths of all rows of a split."""
        return self._lengths[split]

    def roles(self, split: Split) -> NDArray[np.int8]:
        """Return what each row of a split is in its unit, in the order of `lengths`, as places in `ROLES`."""
        parts = [_roles(held.block) for held in self._held[split]]
        return np.concatenate([*parts, np.zeros(0, dtype=np.int8)])

    def set_stream(self, name: str, split: Split, values: NDArray[np.float32]) -> None:
        """Give each token of a split a value, in the order of the rows: part of every batch from now on."""
        blocks = self._held[split]
        bounds = np.cumsum([0, *(len(held.block.input_ids) for held in blocks)])
        assert bounds[-1] == len(values), "a value for each token"
        for held, (first, last) in zip(blocks, pairwise(bounds), strict=True):
            held.streams[name] = values[first:last]

    def stream(self, name: str, split: Split) -> NDArray[np.float32]:
        """Return the values that `set_stream` gave."""
        parts = [held.streams[name] for held in self._held[split]]
        return np.concatenate([*parts, np.zeros(0, dtype=np.float32)])

    def with_role(self, rows: Sequence[int], role: str, split: Split = "TRAIN") -> list[Unit]:
        """Return those of some rows of a split that have a role, each as a unit of its own."""
        units = []
        for row in rows:
            held, place = self._find(row, split)
            if ROLES[_roles(held.block)[place]] != role:
                continue
            first, last = map(int, held.block.bounds[place : place + 2])
            num_supervised = int(held.block.learnt[first + 1 : last].sum())
            units.append(
                Unit(number=row, rows=(row,), num_tokens=last - first, num_supervised=num_supervised)
            )
        return units

    def pack(self, rows: Sequence[int], split: Split = "TRAIN") -> PackedBatch:
        """Lay rows of a split end to end for one forward pass."""
        found = [self._find(row, split) for row in rows]
        parts = [(held, slice(*held.block.bounds[place : place + 2])) for held, place in found]
        streams: dict[str, Any] = {WEIGHT: [held.block.learnt[tokens] for held, tokens in parts]}
        for name in parts[0][0].streams if parts else ():
            streams[name] = [held.streams[name][tokens] for held, tokens in parts]
        ids = [held.block.input_ids[tokens] for held, tokens in parts]
        roles = [ROLES[_roles(held.block)[place]] for held, place in found]
        return pack(ids, streams, rows, roles)

    def _find(self, row: int, split: Split) -> tuple[_Held, int]:
        """Return the block that has a row, and the row's place in it."""
        blocks = self._held[split]
        held = blocks[bisect_right(blocks, row, key=lambda held: int(held.block.rows[0])) - 1]
        place = int(np.searchsorted(held.block.rows, row))
        assert held.block.rows[place] == row, f"row {row} is not in {split}"
        return held, place


def joined(parts: Sequence[Corpus]) -> tuple[Corpus, tuple[int, ...]]:
    """Return the rows of several renderings as one corpus, and the number there of the first row of each."""
    firsts = first_rows([part.lengths("TRAIN"), part.lengths("VALIDATION")] for part in parts)
    whole = Corpus()
    for part, first in zip(parts, firsts, strict=True):
        whole.extend(part, first)
    return whole, firsts


def _roles(block: Block) -> NDArray[np.int8]:
    return np.zeros(len(block.rows), dtype=np.int8) if block.roles is None else block.roles


def _extend(column: Any, values: NDArray[Any]) -> None:
    column.frombytes(values.astype(column.typecode).tobytes())
