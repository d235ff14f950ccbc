"""What a plan says of many rows within seconds: all of them are looked at, steps are counted on some.

The order of an epoch takes a hash of each unit, so that counting all steps exactly takes some 4 s for each million rows
that pass. A run does that once, before its first step. A plan is asked for while somebody waits: it counts whole epochs
up to a number of rows, of an epoch that has more a sample of its units, and takes the others to be like them. Of a
rendering that is mixed in it keeps about what passes, where all of it are too many rows to be put in order.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from luthier.training.recipes.batches import BatchSettings, Drawn, PlanTotals, count_steps
from luthier.training.recipes.mixture import Mixture
from luthier.training.recipes.survey import Longest, PackedLengths, Survey, finest, fits

MOST_COUNTED = 400_000
"""Rows, counted anew in each epoch, whose steps are counted: some two seconds of work."""
_SPARE = 1.1
"""Kept of a rendering that is mixed in, over what passes of it: units that were drawn may be smaller than others."""


def quick_survey(
    train: PackedLengths,
    validation: PackedLengths,
    batches: BatchSettings,
    mixture: Mixture | None = None,
    most_counted: int = MOST_COUNTED,
    *,
    is_cut: bool = False,
) -> Survey:
    """Return what `survey` finds of the same rows; `is_cut` is its own.

    Totals are an estimate where more rows pass than `most_counted`, or teach in a mixture.
    """
    firsts = mixture.first_rows if mixture else (0,)
    trained, validated = _parts(train, firsts), _parts(validation, firsts)
    own, *mixed = map(_looked_at, trained, validated)
    found = replace(own, mixed=tuple(mixed))
    if not all(fits(part, batches) for part in (own, *mixed)):
        return found
    counted = finest(batches, found) if is_cut else batches
    return replace(found, totals=_totals(train, trained, counted, mixture, most_counted))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """Rows of one rendering [N], and its units [U], each a run of rows.

    Attributes:
        places: of the rows among those of all renderings [N].
        numbers: of the rows in their rendering [N].
        num_tokens: of the rows [N].
        first: place of each unit's first row in these columns [U].
        sizes: rows of each unit [U].
        unit_tokens: tokens of each [U].
        unit_supervised: learnt tokens of each [U]; without one it teaches nothing.
        unit_seen: for each token those of its row up to itself, added up over each unit [U].
    """

    places: NDArray[np.int64]
    numbers: NDArray[np.int64]
    num_tokens: NDArray[np.int64]
    first: NDArray[np.int64]
    sizes: NDArray[np.int64]
    unit_tokens: NDArray[np.int64]
    unit_supervised: NDArray[np.int64]
    unit_seen: NDArray[np.int64]

    @property
    def teaches(self) -> NDArray[np.bool_]:
        """Whether each unit has something to learn [U]."""
        found: NDArray[np.bool_] = self.unit_supervised > 0
        return found

    @property
    def num_teaching(self) -> int:
        """Rows of units that have something to learn."""
        return int(self.sizes[self.teaches].sum())


def _parts(lengths: PackedLengths, firsts: Sequence[int]) -> list[_Part]:
    rows, units = np.asarray(lengths.rows), np.asarray(lengths.units)
    num_tokens = np.asarray(lengths.num_tokens, dtype=np.int64)
    num_supervised = np.asarray(lengths.num_supervised, dtype=np.int64)
    source = np.searchsorted(np.array(firsts), rows, side="right") - 1
    found = []
    for number, first_row in enumerate(firsts):
        places = np.flatnonzero(source == number)
        own = units[places]
        begins = np.ones(len(places), dtype=bool)
        begins[1:] = own[1:] != own[:-1]
        first = np.flatnonzero(begins)
        tokens = num_tokens[places]
        found.append(
            _Part(
                places=places,
                numbers=rows[places] - first_row,
                num_tokens=tokens,
                first=first,
                sizes=np.diff(np.append(first, len(places))),
                unit_tokens=_sums(tokens, first),
                unit_supervised=_sums(num_supervised[places], first),
                unit_seen=_sums(tokens * (tokens + 1) // 2, first),
            )
        )
    return found


def _sums(values: NDArray[np.int64], first: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.add.reduceat(values, first) if len(first) else np.zeros(0, dtype=np.int64)


def _looked_at(train: _Part, validation: _Part) -> Survey:
    both = (train, validation)
    return Survey(
        num_train_rows=len(train.places),
        num_teaching_rows=train.num_teaching,
        num_validation_rows=validation.num_teaching,
        longest_train=_longest([train]),
        longest=_longest(both),
        longest_row=_longest_row(both),
        totals=None,
    )


def _longest(parts: Sequence[_Part]) -> Longest | None:
    """Return the longest unit that teaches, the first of equals."""
    lengths = np.concatenate([np.where(part.teaches, part.unit_tokens, -1) for part in parts])
    if not len(lengths) or lengths.max() < 0:
        return None
    at = int(lengths.argmax())
    numbers = np.concatenate([part.numbers[part.first] for part in parts])
    sizes = np.concatenate([part.sizes for part in parts])
    return Longest(num_tokens=int(lengths[at]), row=int(numbers[at]), num_rows=int(sizes[at]))


def _longest_row(parts: Sequence[_Part]) -> Longest | None:
    """Return the longest row of a unit that teaches, the first of equals."""
    taught = [np.repeat(part.teaches, part.sizes) for part in parts]
    lengths = np.concatenate(
        [np.where(mask, part.num_tokens, -1) for mask, part in zip(taught, parts, strict=True)]
    )
    if not len(lengths) or lengths.max() < 0:
        return None
    at = int(lengths.argmax())
    numbers = np.concatenate([part.numbers for part in parts])
    return Longest(num_tokens=int(lengths[at]), row=int(numbers[at]))


def _totals(
    train: PackedLengths,
    parts: Sequence[_Part],
    batches: BatchSettings,
    mixture: Mixture | None,
    most_counted: int,
) -> PlanTotals:
    passing = _passes_of_an_epoch(parts, mixture)
    rows = sum(times * part.num_teaching for times, part in zip(passing, parts, strict=True))
    epochs = int(min(batches.num_epochs, max(1, most_counted // rows)))
    share = min(1.0, most_counted / rows)
    whole = share == 1
    kept = [share] * len(parts)
    if mixture is not None and share * sum(part.num_teaching for part in parts) > most_counted:
        kept[1:] = [share * min(1.0, _SPARE * epochs * times) for times in passing[1:]]
    settings = replace(batches, num_epochs=epochs, max_steps=batches.max_steps if whole else 0)
    counted = count_steps(_sample(train, parts, kept, batches.seed), settings, mixture)
    has_all = all(one == 1 for one in kept)
    if has_all and (epochs == batches.num_epochs or counted.num_steps == batches.max_steps):
        return counted
    if whole:
        return _scaled(counted, counted.num_steps / epochs, parts, batches, mixture)
    steps_per_epoch = _of_all(counted, share)
    counted = replace(counted, num_steps_per_epoch=round(steps_per_epoch))
    return _scaled(counted, steps_per_epoch, parts, batches, mixture)


def _passes_of_an_epoch(parts: Sequence[_Part], mixture: Mixture | None) -> list[float]:
    """Return about how often each rendering passes in an epoch, which is one pass over the run's own."""
    if mixture is None:
        return [1.0]
    weights = [
        int(part.teaches.sum()) if mixture.measure == "UNITS" else int(part.unit_supervised.sum())
        for part in parts
    ]
    return [
        weights[0] * share / mixture.shares[0] / weight
        for share, weight in zip(mixture.shares, weights, strict=True)
    ]


def _sample(train: PackedLengths, parts: Sequence[_Part], kept: Sequence[float], seed: int) -> PackedLengths:
    """Return the rows of so large a share of each rendering's units that teach, drawn without order."""
    draw = np.random.default_rng(seed % 2**64)
    chosen = []
    for part, share in zip(parts, kept, strict=True):
        mask = part.teaches
        if share < 1:
            units = np.flatnonzero(mask)
            mask = np.zeros(len(part.sizes), dtype=bool)
            mask[draw.choice(units, max(1, math.ceil(share * len(units))), replace=False)] = True
        chosen.append(part.places[np.repeat(mask, part.sizes)])
    places = np.concatenate(chosen)

    def some(column: array[int]) -> array[int]:
        return array(column.typecode, np.asarray(column)[places].tobytes())

    return PackedLengths(
        rows=some(train.rows),
        units=some(train.units),
        num_tokens=some(train.num_tokens),
        num_supervised=some(train.num_supervised),
    )


def _of_all(counted: PlanTotals, share: float) -> float:
    """Return the steps of an epoch from those of a share of it: the last one of each is half full, as a rule."""
    return max(1.0, (counted.num_steps - 0.5) / share + 0.5)


def _scaled(
    counted: PlanTotals,
    steps_per_epoch: float,
    parts: Sequence[_Part],
    batches: BatchSettings,
    mixture: Mixture | None,
) -> PlanTotals:
    """Return what all steps come to if they are like those that were counted."""
    own = parts[0]
    if batches.batch_rows and mixture is None:
        steps_per_epoch = math.ceil(int(own.teaches.sum()) / batches.batch_rows)
        counted = replace(counted, num_steps_per_epoch=steps_per_epoch)
    num_steps = max(1, round(steps_per_epoch * batches.num_epochs))
    ends_early = 0 < batches.max_steps <= num_steps
    if ends_early:
        num_steps = batches.max_steps
    factor = num_steps / counted.num_steps
    sums = {
        name: round(getattr(counted, name) * factor) for name in ("num_tokens", "num_supervised", "num_seen")
    }
    if mixture is None and not ends_early:  # each row once in each epoch
        columns = (own.unit_tokens, own.unit_supervised, own.unit_seen)
        sums = {
            name: batches.num_epochs * int(column[own.teaches].sum())
            for name, column in zip(sums, columns, strict=True)
        }
    return replace(
        counted,
        num_rows=sum(part.num_teaching for part in parts),
        num_steps=num_steps,
        **sums,
        largest_step_tokens=_most_of_a_step(parts, batches, mixture),
        drawn=tuple(_times(one, factor) for one in counted.drawn),
        passes=_counts(counted, num_steps),
        num_counted_steps=counted.num_steps,
    )


def _times(drawn: Drawn, factor: float) -> Drawn:
    values: dict[str, Any] = {one.name: round(getattr(drawn, one.name) * factor) for one in fields(drawn)}
    return Drawn(**values)


def _counts(counted: PlanTotals, num_steps: int) -> dict[int, int]:
    """Return how many of all steps have so many passes; they add up, and what none is left of is not named."""
    parts = {passes: divmod(count * num_steps, counted.num_steps) for passes, count in counted.passes.items()}
    found = {passes: whole for passes, (whole, _) in parts.items()}
    left = num_steps - sum(found.values())
    for passes in sorted(parts, key=lambda one: -parts[one][1])[:left]:
        found[passes] += 1
    assert sum(found.values()) == num_steps, f"{found} are not {num_steps} steps"
    return {passes: count for passes, count in found.items() if count}


def _most_of_a_step(parts: Sequence[_Part], batches: BatchSettings, mixture: Mixture | None) -> int:
    """Return the most tokens that any step may have, counted or not."""
    if not batches.batch_rows:
        return batches.batch_tokens
    tokens = np.concatenate([part.unit_tokens[part.teaches] for part in parts])
    if mixture is not None:  # an epoch of a small rendering may end within a step, which has a unit again
        return batches.batch_rows * int(tokens.max())
    return int(np.sort(tokens)[-batches.batch_rows :].sum())
