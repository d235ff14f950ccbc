"""Which rows make which optimiser step: a pure function of row lengths, settings and seed.

The service plans a job with it and the worker trains by it, so that both count the same steps. Nothing but
the standard library is used.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class RowLength:
    """Length of one row of a rendering.

    Attributes:
        row: number of the row within the rendering, from 0.
        num_tokens: tokens of the row.
        num_supervised: tokens of the row that are learnt.
    """

    row: int
    num_tokens: int
    num_supervised: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchSettings:
    """How rows are put together.

    Attributes:
        seed: decides the order of the rows.
        num_epochs: passes over the rows.
        max_steps: end after this many steps; 0 means no such limit.
        batch_tokens: most tokens of a step; 0 when batch_rows decides.
        batch_rows: rows of a step; 0 when batch_tokens decides.
        micro_batch_tokens: most tokens of one forward pass.
    """

    seed: int
    num_epochs: int
    max_steps: int
    batch_tokens: int
    batch_rows: int
    micro_batch_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One optimiser step.

    Attributes:
        step: number of the step, from 1.
        epoch: pass over the rows, from 0.
        position: number of the step within its epoch, from 0.
        epoch_steps: steps of its epoch.
        micro_batches: row numbers of each forward pass, in order.
        num_tokens: tokens of all rows.
        num_supervised: tokens learnt from all rows.
    """

    step: int
    epoch: int
    position: int
    epoch_steps: int
    micro_batches: tuple[tuple[int, ...], ...]
    num_tokens: int
    num_supervised: int

    @property
    def epochs_done(self) -> float:
        """Passes over the rows that are done when this step is."""
        return self.epoch + (self.position + 1) / self.epoch_steps


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanTotals:
    """What all steps come to.

    Attributes:
        num_rows: rows with something to learn.
        num_steps: optimiser steps.
        num_steps_per_epoch: steps of the first pass; later passes may differ by a few, as other rows meet.
        num_tokens: tokens over all steps.
        num_supervised: learnt tokens over all steps.
        packing_efficiency: tokens over the places that the steps offer, in (0, 1]; 1 when batch_rows decides,
            because nothing is padded.
    """

    num_rows: int
    num_steps: int
    num_steps_per_epoch: int
    num_tokens: int
    num_supervised: int
    packing_efficiency: float


def teaching_rows(rows: Sequence[RowLength]) -> list[RowLength]:
    """Return the rows that have something to learn, in the order given."""
    return [row for row in rows if row.num_supervised > 0]


def iterate_steps(rows: Sequence[RowLength], settings: BatchSettings, after_step: int = 0) -> Iterator[Step]:
    """Yield all steps after `after_step`, in order.

    Args:
        rows: the training rows; those without a supervised token are passed over.
        settings: how rows are put together. Every row must fit into micro_batch_tokens and batch_tokens.
        after_step: steps that are made already.
    """
    usable = teaching_rows(rows)
    number = 0
    for epoch in range(settings.num_epochs if usable else 0):
        groups = _group_into_steps(_permuted(usable, settings.seed, epoch), settings)
        for position, group in enumerate(groups):
            if number == settings.max_steps != 0:
                return
            number += 1
            if number > after_step:
                yield Step(
                    step=number,
                    epoch=epoch,
                    position=position,
                    epoch_steps=len(groups),
                    micro_batches=pack_first_fit(group, settings.micro_batch_tokens),
                    num_tokens=sum(row.num_tokens for row in group),
                    num_supervised=sum(row.num_supervised for row in group),
                )


def count_steps(rows: Sequence[RowLength], settings: BatchSettings) -> PlanTotals:
    """Return what the steps of `iterate_steps` come to."""
    num_steps = num_tokens = num_supervised = steps_per_epoch = 0
    for step in iterate_steps(rows, settings):
        steps_per_epoch = steps_per_epoch or step.epoch_steps
        num_steps = step.step
        num_tokens += step.num_tokens
        num_supervised += step.num_supervised
    places = num_steps * settings.batch_tokens
    return PlanTotals(
        num_rows=len(teaching_rows(rows)),
        num_steps=num_steps,
        num_steps_per_epoch=steps_per_epoch,
        num_tokens=num_tokens,
        num_supervised=num_supervised,
        packing_efficiency=num_tokens / places if places else 1.0,
    )


def pack_first_fit(rows: Sequence[RowLength], limit_tokens: int) -> tuple[tuple[int, ...], ...]:
    """Put each row, in order, into the first group that has room for it; return the row numbers by group.

    Takes O(n log n) for n rows.
    """
    groups: list[list[int]] = []
    # A tree over as many groups as there are rows: a node holds the most room of any group below it.
    num_leaves = 1 << max(0, len(rows) - 1).bit_length()
    room = [limit_tokens] * (2 * num_leaves)
    for row in rows:
        assert row.num_tokens <= limit_tokens, f"row {row.row} has {row.num_tokens} tokens of {limit_tokens}"
        node = 1
        while node < num_leaves:
            node = 2 * node if room[2 * node] >= row.num_tokens else 2 * node + 1
        place = node - num_leaves
        if place == len(groups):
            groups.append([])
        groups[place].append(row.row)
        room[node] -= row.num_tokens
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return tuple(tuple(group) for group in groups)


def plan_digest(
    rows: Sequence[RowLength], validation_rows: Sequence[RowLength], settings: BatchSettings
) -> str:
    """Return a sha256 in hex that two runs share when their steps and validations use the same rows."""
    hasher = hashlib.sha256(repr(settings).encode())
    for split in (rows, validation_rows):
        hasher.update(b"split")
        for row in split:
            hasher.update(b"%d,%d,%d;" % (row.row, row.num_tokens, row.num_supervised))
    return hasher.hexdigest()


def _permuted(rows: Sequence[RowLength], seed: int, epoch: int) -> list[RowLength]:
    """Order rows by BLAKE2b of (seed, epoch, row): the same on every machine and in every version."""

    def rank(row: RowLength) -> tuple[bytes, int]:
        return hashlib.blake2b(b"%d/%d/%d" % (seed, epoch, row.row), digest_size=16).digest(), row.row

    return sorted(rows, key=rank)


def _group_into_steps(rows: Sequence[RowLength], settings: BatchSettings) -> list[list[RowLength]]:
    if settings.batch_rows:
        size = settings.batch_rows
        return [list(rows[start : start + size]) for start in range(0, len(rows), size)]
    groups: list[list[RowLength]] = []
    room = 0
    for row in rows:
        assert row.num_tokens <= settings.batch_tokens, f"row {row.row} has {row.num_tokens} tokens"
        if not groups or row.num_tokens > room:
            groups.append([])
            room = settings.batch_tokens
        groups[-1].append(row)
        room -= row.num_tokens
    return groups
