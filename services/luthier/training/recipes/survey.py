"""What a run would make of its rows, from their lengths alone: what fits, what teaches, how many steps.

The worker finds it before the first step. A plan finds the same by columns, of many rows within seconds (`estimate`);
both are held to what is found by the same functions. Nothing but the standard library and the error tree is used.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from operator import add
from typing import NamedTuple

from luthier.errors import FailedPrecondition, FieldViolation, InvalidArgument, Reason
from luthier.training.recipes.batches import (
    BatchSettings,
    PlanTotals,
    RowLength,
    Unit,
    count_steps,
    teaching_units,
)
from luthier.training.recipes.mixture import Mixture


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedLengths:
    """Lengths of many rows in 24 bytes each, iterated as `RowLength`; the four arrays are equally long."""

    rows: array[int] = field(default_factory=lambda: array("q"))
    units: array[int] = field(default_factory=lambda: array("q"))
    num_tokens: array[int] = field(default_factory=lambda: array("i"))
    num_supervised: array[int] = field(default_factory=lambda: array("i"))

    @classmethod
    def of(cls, lengths: Iterable[RowLength]) -> PackedLengths:
        """Pack lengths that come one by one."""
        packed = cls()
        for length in lengths:
            packed.rows.append(length.row)
            packed.units.append(length.row if length.unit is None else length.unit)
            packed.num_tokens.append(length.num_tokens)
            packed.num_supervised.append(length.num_supervised)
        return packed

    def extend(self, others: PackedLengths, first_row: int) -> None:
        """Add the rows of another rendering, numbered on from `first_row`."""
        self.rows.extend(row + first_row for row in others.rows)
        self.units.extend(unit + first_row for unit in others.units)
        self.num_tokens.extend(others.num_tokens)
        self.num_supervised.extend(others.num_supervised)

    def with_answers(self, max_new_tokens: int) -> PackedLengths:
        """Return the lengths of prompts, each with the longest answer that may be sampled to it, which is learnt.

        What plans other methods plans reinforcement by them: a step's rows are then its prompts, and their tokens the
        most that one sample of each can have. A prompt without a token cannot be answered, and teaches nothing.
        """
        answers = array("i", (max_new_tokens if length else 0 for length in self.num_tokens))
        return PackedLengths(
            rows=self.rows,
            units=self.units,
            num_tokens=array("i", map(add, self.num_tokens, answers)),
            num_supervised=answers,
        )

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[RowLength]:
        for row, unit, num_tokens, num_supervised in zip(
            self.rows, self.units, self.num_tokens, self.num_supervised, strict=True
        ):
            yield RowLength(
                row=row,
                num_tokens=num_tokens,
                num_supervised=num_supervised,
                unit=None if unit == row else unit,
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Longest:
    """The longest row or unit that teaches: `num_tokens` from its (first) row on; None: only the length is known."""

    num_tokens: int
    row: int | None = None
    num_rows: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """What was found; of a mixture in the run's own rendering.

    Attributes:
        num_train_rows: training rows, those that teach nothing among them.
        num_teaching_rows: those of them that have something to learn, with all rows of their units.
        num_validation_rows: validation rows that have something to learn.
        longest_train: the longest training unit that teaches; None without one.
        longest: the same over both splits.
        longest_row: the longest row of such a unit, over both splits.
        totals: what all steps come to, of a mixture with what they take of the others; None when no row of a rendering
            teaches, or one is too long for a step.
        mixed: what was found in each other rendering of a mixture, as it numbers its rows; without totals.
    """

    num_train_rows: int
    num_teaching_rows: int
    num_validation_rows: int
    longest_train: Longest | None
    longest: Longest | None
    longest_row: Longest | None
    totals: PlanTotals | None
    mixed: tuple[Survey, ...] = ()


def first_rows(splits: Iterable[Sequence[PackedLengths]]) -> tuple[int, ...]:
    """Return where the rows of each of several renderings begin once they are numbered through.

    Args:
        splits: all splits that are read of each, in the order of the renderings.
    """
    found = [0]
    for parts in splits:
        found.append(found[-1] + 1 + max((max(part.rows) for part in parts if part.rows), default=-1))
    return tuple(found[:-1])


def survey(
    train: Iterable[RowLength],
    validation: Iterable[RowLength],
    batches: BatchSettings,
    mixture: Mixture | None = None,
    *,
    is_cut: bool = False,
) -> Survey:
    """Look at all rows, those of a mixture numbered through. Takes some 4 s for each pass over a million rows.

    With `is_cut` passes of an open size are counted as small as rows allow, which takes longer; else a step is one.
    """
    rows, others = list(train), list(validation)
    if mixture is None:
        found = _looked_at(rows, others)
    else:
        own, *mixed = map(_looked_at, _parted(rows, mixture), _parted(others, mixture))
        found = replace(own, mixed=tuple(mixed))
    can_be_counted = all(fits(part, batches) for part in (found, *found.mixed))
    if not can_be_counted:
        return found
    counted = finest(batches, found) if is_cut else batches
    return replace(found, totals=count_steps(rows, counted, mixture))


def finest(batches: BatchSettings, found: Survey) -> BatchSettings:
    """Return settings whose passes, where their size is open, are as small as the longest unit allows."""
    if batches.micro_batch_tokens:
        return batches
    longest = (part.longest.num_tokens for part in (found, *found.mixed) if part.longest is not None)
    return replace(batches, micro_batch_tokens=max(longest))


def _parted(rows: Iterable[RowLength], mixture: Mixture) -> list[list[RowLength]]:
    """Return the rows of each rendering, numbered as it numbers them."""
    parts: list[list[RowLength]] = [[] for _ in mixture.names]
    for row in rows:
        source = mixture.source(row.row)
        first = mixture.first_rows[source]
        unit = None if row.unit is None else row.unit - first
        parts[source].append(replace(row, row=row.row - first, unit=unit))
    return parts


def _looked_at(rows: Sequence[RowLength], others: Sequence[RowLength]) -> Survey:
    teaching, validating = teaching_units(rows), teaching_units(others)
    return Survey(
        num_train_rows=len(rows),
        num_teaching_rows=sum(len(unit.rows) for unit in teaching),
        num_validation_rows=sum(len(unit.rows) for unit in validating),
        longest_train=_longest(teaching),
        longest=_longest([*teaching, *validating]),
        longest_row=_longest_row([*teaching, *validating], [*rows, *others]),
        totals=None,
    )


def fits(part: Survey, batches: BatchSettings) -> bool:
    """Whether a rendering has something to learn, and each unit fits into a step and into a forward pass."""
    return part.longest_train is not None and not _too_small(batches, part.longest_train, part.longest)


def require_fitting(
    found: Survey, batches: BatchSettings, context_length: int, max_new_tokens: int = 0, of: str = ""
) -> None:
    """Check that every row fits into the model's context, every unit into a forward pass and a step; what is None fits.

    Rows whose answers are still to be sampled are counted `with_answers` of `max_new_tokens`. `of` names the rendering
    that is looked at, where there are several. Those of `found.mixed` are not looked at.

    Raises:
        InvalidArgument: SEQUENCE_TOO_LONG, a setting must be larger; all that are too small are named.
        FailedPrecondition: SEQUENCE_TOO_LONG, rows are longer than the model's `context_length` (0: not known).
    """
    longest = found.longest_row
    if context_length and longest is not None and longest.num_tokens > context_length:
        if max_new_tokens:
            raise _no_room(longest, max_new_tokens, context_length, of)
        which = "the longest row" if longest.row is None else f"row {longest.row}"
        which += f" of {of}" if of else ""
        raise FailedPrecondition(
            f"rows must have at most the base model's {context_length} tokens, {which} has "
            f"{longest.num_tokens}; create the rendering with a smaller max_tokens",
            reason=Reason.SEQUENCE_TOO_LONG,
            metadata={"num_tokens": str(longest.num_tokens), **_rows([longest], of)},
        )
    too_small = _too_small(batches, found.longest_train, found.longest)
    if too_small:
        violations = tuple(_violation(one, max_new_tokens, of) for one in too_small)
        raise InvalidArgument(
            "; ".join(violation.description for violation in violations),
            reason=Reason.SEQUENCE_TOO_LONG,
            metadata=_rows([one.least for one in too_small], of),
            violations=violations,
        )


def require_rows(most: int, least: int, name: str) -> None:
    """Check that a step has something for each of so many ranks: at most `most` rows, or whatever `name` says.

    Raises:
        FailedPrecondition: TOO_MANY_RANKS.
    """
    if least > max(1, most):
        raise FailedPrecondition(
            f"ranks.min_ranks must be at most the {most} {name} of the largest step, got {least}: lower it, or make "
            f"steps of more {name}",
            reason=Reason.TOO_MANY_RANKS,
            metadata={"min_ranks": str(least), name: str(most)},
        )


def require_ranks(totals: PlanTotals, least: int, *, is_open: bool) -> None:
    """Check that at least one step has a forward pass for each of so many ranks; `is_open`: their size is chosen.

    Raises:
        FailedPrecondition: TOO_MANY_RANKS.
    """
    most = max(totals.passes, default=0)
    if least > max(1, most):
        advice = "make more passes of a step by a smaller micro_batch_tokens or a larger batch"
        if is_open:
            advice = "make steps larger, as no pass is smaller than the longest row"
        raise FailedPrecondition(
            f"ranks.min_ranks must be at most the {most} forward passes of the largest step, got {least}: lower it, or "
            f"{advice}",
            reason=Reason.TOO_MANY_RANKS,
            metadata={"min_ranks": str(least), "passes": str(most)},
        )


def steps_with_idle_ranks(totals: PlanTotals, num_ranks: int) -> int:
    """Return how many steps have fewer forward passes than there are ranks."""
    return sum(count for passes, count in totals.passes.items() if passes < num_ranks)


class _TooSmall(NamedTuple):
    """A setting that is too small: its name, its value, and what it has to hold."""

    name: str
    value: int
    least: Longest


def _too_small(
    batches: BatchSettings, longest_train: Longest | None, longest: Longest | None
) -> list[_TooSmall]:
    limits = (
        ("micro_batch_tokens", batches.micro_batch_tokens, longest),
        ("batch_tokens", batches.batch_tokens, longest_train),
    )
    return [
        _TooSmall(name, value, least)
        for name, value, least in limits
        if value and least is not None and value < least.num_tokens
    ]


def _violation(found: _TooSmall, max_new_tokens: int, of: str) -> FieldViolation:
    return FieldViolation(
        field=f"fine_tuning_job.hyperparameters.{found.name}",
        description=f"hyperparameters.{found.name} must be at least {found.least.num_tokens}, "
        f"{_described(found.least, max_new_tokens, of)}, got {found.value}",
        reason=Reason.SEQUENCE_TOO_LONG,
    )


def _rows(longest: Sequence[Longest], of: str) -> dict[str, str]:
    """Return what an error's metadata has of the first rows of some units, and of a rendering among several."""
    rows = list(dict.fromkeys(str(one.row) for one in longest if one.row is not None))
    named = {"rendering": of} if of else {}
    return {"rows": ",".join(rows), **named} if rows else named


def _no_room(longest: Longest, max_new_tokens: int, context_length: int, of: str) -> FailedPrecondition:
    prompt_tokens = longest.num_tokens - max_new_tokens
    room = context_length - prompt_tokens
    advice = f"set max_new_tokens to {room} or less, or " if room > 0 else ""
    return FailedPrecondition(
        f"prompts and their answers must have at most the base model's {context_length} tokens, the longest prompt"
        f"{_numbered(longest)} has {prompt_tokens} and its answer may have {max_new_tokens}; {advice}create the "
        "rendering with a smaller max_tokens",
        reason=Reason.SEQUENCE_TOO_LONG,
        metadata={"num_tokens": str(longest.num_tokens), **_rows([longest], of)},
    )


def _described(longest: Longest, max_new_tokens: int, of: str) -> str:
    if max_new_tokens:
        return f"the longest prompt{_numbered(longest)} of {longest.num_tokens - max_new_tokens} and max_new_tokens"
    alone = longest.num_rows == 1
    what = "the longest row" if alone else f"the longest unit, of {longest.num_rows} rows"
    what += _numbered(longest)
    if not of:
        return what
    return f"{what} of {of}" if alone else f"{what}, of {of}"


def _numbered(longest: Longest) -> str:
    if longest.row is None:
        return ""
    return f" (row {longest.row})" if longest.num_rows == 1 else f" (from row {longest.row} on)"


def _longest(units: Sequence[Unit]) -> Longest | None:
    unit = max(units, key=lambda unit: unit.num_tokens, default=None)
    if unit is None:
        return None
    return Longest(num_tokens=unit.num_tokens, row=unit.number, num_rows=len(unit.rows))


def _longest_row(units: Sequence[Unit], rows: Sequence[RowLength]) -> Longest | None:
    """Return the longest row of some units: that of the longest unit, where each is one row."""
    if all(len(unit.rows) == 1 for unit in units):
        return _longest(units)
    wanted = {number for unit in units for number in unit.rows}
    row = max((row for row in rows if row.row in wanted), key=lambda row: row.num_tokens)
    return Longest(num_tokens=row.num_tokens, row=row.row)
