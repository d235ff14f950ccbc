"""Which rows make which optimiser step: a pure function of row lengths, settings and seed.

Rows come in units: rows that share a forward pass, one or several. Units are ordered and packed, never cut.

The service plans a job with it and the worker trains by it, so that both count the same steps. Nothing but
the standard library is used.

Of a mixture of renderings an epoch is one pass over the run's own. Units of the others come between its units, each
time of the rendering that is furthest behind its share, the next unit counted by half (Sainte-Laguë's method, which
favours neither large shares nor small ones). So every stretch of them, and every step, is as near its shares as whole
units can be. A rendering's units come in a seeded order, each once, and then anew in another one; where an epoch ends
the next goes on.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count, groupby

from luthier.training.recipes.mixture import Mixture


@dataclass(frozen=True, slots=True, kw_only=True)
class RowLength:
    """Length of one row of a rendering.

    Attributes:
        row: number of the row within the rendering, from 0.
        num_tokens: tokens of the row.
        num_supervised: tokens of the row that are learnt.
        unit: number of the first row of its unit; None: its own.
    """

    row: int
    num_tokens: int
    num_supervised: int
    unit: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """Rows that share a forward pass.

    Attributes:
        number: number of its first row.
        rows: their numbers.
        num_tokens: tokens of all of them.
        num_supervised: tokens learnt from all of them.
    """

    number: int
    rows: tuple[int, ...]
    num_tokens: int
    num_supervised: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchSettings:
    """How rows are put together.

    Attributes:
        seed: decides the order of the rows.
        num_epochs: passes over the rows, of a mixture over those of the run's own rendering.
        max_steps: end after this many steps; 0 means no such limit.
        batch_tokens: most tokens of a step; 0 when batch_rows decides.
        batch_rows: units of a step; 0 when batch_tokens decides.
        micro_batch_tokens: most tokens of one forward pass; 0: not chosen yet, a step is one.
    """

    seed: int
    num_epochs: int
    max_steps: int
    batch_tokens: int
    batch_rows: int
    micro_batch_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """What is taken of one rendering; what is taken again counts again."""

    num_units: int = 0
    num_rows: int = 0
    num_tokens: int = 0
    num_supervised: int = 0

    def plus(self, other: Drawn) -> Drawn:
        """Return both together."""
        return Drawn(
            num_units=self.num_units + other.num_units,
            num_rows=self.num_rows + other.num_rows,
            num_tokens=self.num_tokens + other.num_tokens,
            num_supervised=self.num_supervised + other.num_supervised,
        )


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
        drawn: what of these is of each rendering of a mixture; empty without one.
    """

    step: int
    epoch: int
    position: int
    epoch_steps: int
    micro_batches: tuple[tuple[int, ...], ...]
    num_tokens: int
    num_supervised: int
    drawn: tuple[Drawn, ...] = ()

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
        drawn: what all steps take of each rendering of a mixture; empty without one.
        passes: how many steps have so many forward passes, by that number, in ascending order.
        largest_step_tokens: tokens of the largest step; of an estimate the most that any may have.
        num_seen: for each token of all steps those of its row up to itself, added up.
        num_counted_steps: steps that were counted, where all is estimated from them (`estimate`); 0: nothing is.
    """

    num_rows: int
    num_steps: int
    num_steps_per_epoch: int
    num_tokens: int
    num_supervised: int
    packing_efficiency: float
    drawn: tuple[Drawn, ...] = ()
    passes: Mapping[int, int] = field(default_factory=dict)
    largest_step_tokens: int = 0
    num_seen: int = 0
    num_counted_steps: int = 0


def teaching_units(rows: Iterable[RowLength]) -> list[Unit]:
    """Return the units that have something to learn, in the order given; rows of a unit follow one another."""
    units = []
    for number, group in groupby(rows, key=lambda row: row.row if row.unit is None else row.unit):
        members = tuple(group)
        num_supervised = sum(row.num_supervised for row in members)
        if num_supervised > 0:
            units.append(
                Unit(
                    number=number,
                    rows=tuple(row.row for row in members),
                    num_tokens=sum(row.num_tokens for row in members),
                    num_supervised=num_supervised,
                )
            )
    return units


def iterate_steps(
    rows: Iterable[RowLength], settings: BatchSettings, after_step: int = 0, mixture: Mixture | None = None
) -> Iterator[Step]:
    """Yield all steps after `after_step`, in order.

    Args:
        rows: the training rows; units without a supervised token are passed over.
        settings: how units are put together. Each must fit into micro_batch_tokens and batch_tokens.
        after_step: steps that are made already.
        mixture: whose rows these are; None: they are of one rendering. Each has a unit with a supervised token.
    """
    usable = teaching_units(rows)
    epochs = _epochs(usable, settings) if mixture is None else _mixed_epochs(usable, settings, mixture)
    number = 0
    for epoch, units in enumerate(epochs):
        groups = _group_into_steps(units, settings)
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
                    num_tokens=sum(unit.num_tokens for unit in group),
                    num_supervised=sum(unit.num_supervised for unit in group),
                    drawn=() if mixture is None else _drawn(group, mixture),
                )


def count_steps(
    rows: Iterable[RowLength], settings: BatchSettings, mixture: Mixture | None = None
) -> PlanTotals:
    """Return what the steps of `iterate_steps` come to."""
    rows = list(rows)
    seen = {row.row: row.num_tokens * (row.num_tokens + 1) // 2 for row in rows}
    num_steps = num_tokens = num_supervised = steps_per_epoch = largest = num_seen = 0
    drawn = tuple(Drawn() for _ in mixture.shares) if mixture else ()
    passes: Counter[int] = Counter()
    for step in iterate_steps(rows, settings, mixture=mixture):
        steps_per_epoch = steps_per_epoch or step.epoch_steps
        num_steps = step.step
        num_tokens += step.num_tokens
        num_supervised += step.num_supervised
        passes[len(step.micro_batches)] += 1
        largest = max(largest, step.num_tokens)
        num_seen += sum(seen[row] for batch in step.micro_batches for row in batch)
        drawn = tuple(before.plus(one) for before, one in zip(drawn, step.drawn, strict=True))
    places = num_steps * settings.batch_tokens
    return PlanTotals(
        num_rows=sum(len(unit.rows) for unit in teaching_units(rows)),
        num_steps=num_steps,
        num_steps_per_epoch=steps_per_epoch,
        num_tokens=num_tokens,
        num_supervised=num_supervised,
        packing_efficiency=num_tokens / places if places else 1.0,
        drawn=drawn,
        passes=dict(sorted(passes.items())),
        largest_step_tokens=largest,
        num_seen=num_seen,
    )


def shares_reached(drawn: Sequence[Drawn], mixture: Mixture) -> list[float]:
    """Return the share of each rendering of a mixture in what was taken; all 0 where that is nothing."""
    parts = [one.num_units if mixture.measure == "UNITS" else one.num_supervised for one in drawn]
    whole = sum(parts)
    return [part / whole if whole else 0.0 for part in parts]


def pack_first_fit(units: Sequence[Unit], limit_tokens: int) -> tuple[tuple[int, ...], ...]:
    """Put each unit, in order, into the first group that has room for it; return the row numbers by group.

    A limit of 0 is none. Takes O(n log n) for n units.
    """
    if not limit_tokens:
        return (tuple(row for unit in units for row in unit.rows),) if units else ()
    groups: list[list[int]] = []
    # A tree over as many groups as there are units: a node holds the most room of any group below it.
    num_leaves = 1 << max(0, len(units) - 1).bit_length()
    room = [limit_tokens] * (2 * num_leaves)
    for unit in units:
        assert unit.num_tokens <= limit_tokens, (
            f"unit {unit.number} has {unit.num_tokens} tokens of {limit_tokens}"
        )
        node = 1
        while node < num_leaves:
            node = 2 * node if room[2 * node] >= unit.num_tokens else 2 * node + 1
        place = node - num_leaves
        if place == len(groups):
            groups.append([])
        groups[place].extend(unit.rows)
        room[node] -= unit.num_tokens
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return tuple(tuple(group) for group in groups)


def plan_digest(
    rows: Iterable[RowLength],
    validation_rows: Iterable[RowLength],
    settings: BatchSettings,
    mixture: Mixture | None = None,
) -> str:
    """Return a sha256 in hex that two runs share when their steps and validations use the same rows and units."""
    hasher = hashlib.sha256(repr(settings).encode())
    if mixture is not None:
        hasher.update(repr((mixture.first_rows, mixture.shares, mixture.measure)).encode())
    for split in (rows, validation_rows):
        hasher.update(b"split")
        for row in split:
            hasher.update(b"%d,%d,%d;" % (row.row, row.num_tokens, row.num_supervised))
            if row.unit not in (None, row.row):
                hasher.update(b"of %d;" % row.unit)
    return hasher.hexdigest()


def _epochs(usable: Sequence[Unit], settings: BatchSettings) -> Iterator[list[Unit]]:
    for epoch in range(settings.num_epochs if usable else 0):
        yield _permuted(usable, settings.seed, epoch)


def _mixed_epochs(usable: Sequence[Unit], settings: BatchSettings, mixture: Mixture) -> Iterator[list[Unit]]:
    parts: list[list[Unit]] = [[] for _ in mixture.shares]
    for unit in usable:
        parts[mixture.source(unit.number)].append(unit)
    assert all(parts), "each rendering of a mixture has something to learn"
    others = [_without_end(part, settings.seed) for part in parts[1:]]
    following = [next(other) for other in others]
    taken = [0] * len(parts)
    for epoch in range(settings.num_epochs):
        own = iter(_permuted(parts[0], settings.seed, epoch))
        coming, units = next(own, None), []
        while True:
            upcoming = [coming, *following]
            # The first of equals, so that an epoch begins with the run's own.
            source = min(range(len(parts)), key=lambda one: _due(one, taken, upcoming, mixture))
            drawn = upcoming[source]
            if drawn is None:
                break
            units.append(drawn)
            taken[source] += _weight(drawn, mixture)
            if source == 0:
                coming = next(own, None)
            else:
                following[source - 1] = next(others[source - 1])
        yield units


def _due(source: int, taken: Sequence[int], upcoming: Sequence[Unit | None], mixture: Mixture) -> float:
    """Return how much of everything a rendering is due at: the less, the sooner it comes."""
    unit = upcoming[source]
    # None: an epoch ends, once those that its own rendering has left behind have come.
    half = 0.0 if unit is None else _weight(unit, mixture) / 2
    return (taken[source] + half) / mixture.shares[source]


def _weight(unit: Unit, mixture: Mixture) -> int:
    return 1 if mixture.measure == "UNITS" else unit.num_supervised


def _without_end(units: Sequence[Unit], seed: int) -> Iterator[Unit]:
    for again in count():
        yield from _permuted(units, seed, again)


def _drawn(group: Sequence[Unit], mixture: Mixture) -> tuple[Drawn, ...]:
    found = [Drawn() for _ in mixture.shares]
    for unit in group:
        source = mixture.source(unit.number)
        found[source] = found[source].plus(
            Drawn(
                num_units=1,
                num_rows=len(unit.rows),
                num_tokens=unit.num_tokens,
                num_supervised=unit.num_supervised,
            )
        )
    return tuple(found)


def _permuted(units: Sequence[Unit], seed: int, epoch: int) -> list[Unit]:
    """Order units by BLAKE2b of (seed, epoch, number): the same on every machine and in every version."""

    def rank(unit: Unit) -> tuple[bytes, int]:
        key = b"%d/%d/%d" % (seed, epoch, unit.number)
        return hashlib.blake2b(key, digest_size=16).digest(), unit.number

    return sorted(units, key=rank)


def _group_into_steps(units: Sequence[Unit], settings: BatchSettings) -> list[list[Unit]]:
    if settings.batch_rows:
        size = settings.batch_rows
        return [list(units[start : start + size]) for start in range(0, len(units), size)]
    groups: list[list[Unit]] = []
    room = 0
    for unit in units:
        assert unit.num_tokens <= settings.batch_tokens, f"unit {unit.number} has {unit.num_tokens} tokens"
        if not groups or unit.num_tokens > room:
            groups.append([])
            room = settings.batch_tokens
        groups[-1].append(unit)
        room -= unit.num_tokens
    return groups
