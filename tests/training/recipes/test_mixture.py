"""Mixed renderings: a plan keeps shares in every step, repeats nothing too soon, and is the same wherever made."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.errors import InvalidArgument
from luthier.training.recipes.batches import (
    BatchSettings,
    RowLength,
    Step,
    count_steps,
    iterate_steps,
    plan_digest,
    shares_reached,
)
from luthier.training.recipes.mixture import Measure, Mixture, row_named, rows_listed, rows_named
from luthier.training.recipes.survey import Longest, PackedLengths, first_rows, require_fitting, survey

SETTINGS = BatchSettings(
    seed=7, num_epochs=3, max_steps=0, batch_tokens=400, batch_rows=0, micro_batch_tokens=96
)
NAMES = ("own", "general", "code")


def rendering(count: int, seed: int, first: int = 0, longest: int = 40) -> list[RowLength]:
    """Rows that all teach, numbered on from `first`."""
    draw = random.Random(seed)
    lengths = [draw.randint(2, longest) for _ in range(count)]
    return [
        RowLength(row=first + row, num_tokens=length, num_supervised=draw.randint(1, length - 1))
        for row, length in enumerate(lengths)
    ]


def mixed(
    counts: Sequence[int], shares: Sequence[float], seed: int = 0, measure: Measure = "TOKENS"
) -> tuple[list[RowLength], Mixture]:
    rows: list[RowLength] = []
    firsts = []
    for number, count in enumerate(counts):
        firsts.append(len(rows))
        rows += rendering(count, seed + number, len(rows))
    mixture = Mixture(
        names=NAMES[: len(counts)], first_rows=tuple(firsts), shares=tuple(shares), measure=measure
    )
    return rows, mixture


def rows_in(steps: Sequence[Step]) -> list[int]:
    return [row for step in steps for batch in step.micro_batches for row in batch]


def weights(rows: Sequence[RowLength], mixture: Mixture) -> dict[int, int]:
    return {row.row: 1 if mixture.measure == "UNITS" else row.num_supervised for row in rows}


mixtures = st.builds(
    lambda counts, share, part, seed, measure: mixed(
        counts, (1 - share, share * part, share * (1 - part)), seed, measure
    ),
    st.tuples(st.integers(20, 60), st.integers(1, 60), st.integers(1, 60)),
    st.floats(0.05, 0.9),
    st.floats(0.1, 0.9),
    st.integers(0, 1000),
    st.sampled_from(["TOKENS", "UNITS"]),
)


@given(made=mixtures, seed=st.integers(-5, 5))
def test_an_epoch_is_one_pass_over_the_runs_own_rendering(
    made: tuple[list[RowLength], Mixture], seed: int
) -> None:
    rows, mixture = made
    steps = list(iterate_steps(rows, replace(SETTINGS, seed=seed), mixture=mixture))
    own = [row.row for row in rows if mixture.source(row.row) == 0]
    for epoch in range(3):
        used = rows_in([step for step in steps if step.epoch == epoch])
        assert sorted(row for row in used if mixture.source(row) == 0) == own


@given(made=mixtures)
def test_every_step_is_as_near_its_shares_as_whole_units_can_be(
    made: tuple[list[RowLength], Mixture],
) -> None:
    rows, mixture = made
    weight = weights(rows, mixture)
    heaviest = max(weight.values())
    for step in iterate_steps(rows, SETTINGS, mixture=mixture):
        found = Counter(dict.fromkeys(range(3), 0))
        for row in rows_in([step]):
            found[mixture.source(row)] += weight[row]
        whole = sum(found.values())
        for source, share in enumerate(mixture.shares):
            assert abs(found[source] - share * whole) <= 3 * heaviest, (step.step, source)
        assert [share * whole for share in shares_reached(step.drawn, mixture)] == pytest.approx(
            [found[source] for source in range(3)]
        )


@given(made=mixtures)
def test_no_row_comes_again_before_all_of_its_rendering_have_come(
    made: tuple[list[RowLength], Mixture],
) -> None:
    rows, mixture = made
    steps = list(iterate_steps(rows, SETTINGS, mixture=mixture))
    for source in (1, 2):
        of = {row.row for row in rows if mixture.source(row.row) == source}
        counts = Counter(row for row in rows_in(steps) if row in of)
        most = max(counts.values(), default=0)
        assert all(counts[row] in (most - 1, most) for row in of)


def test_what_is_drawn_anew_comes_in_another_order() -> None:
    rows, mixture = mixed((400, 6), (0.5, 0.5), measure="UNITS")
    steps = list(iterate_steps(rows, replace(SETTINGS, num_epochs=1), mixture=mixture))
    drawn = [row for step in steps for batch in step.micro_batches for row in batch if row >= 400]
    assert len(drawn) == 400
    orders = {tuple(drawn[start : start + 6]) for start in range(0, 390, 6)}
    # Units of a step are packed into micro-batches, so that its order is not the one in which they came.
    assert len(orders) > 20


@given(made=mixtures, after_step=st.integers(0, 40))
def test_steps_after_a_step_are_the_tail_of_the_whole(
    made: tuple[list[RowLength], Mixture], after_step: int
) -> None:
    rows, mixture = made
    whole = list(iterate_steps(rows, SETTINGS, mixture=mixture))
    assert list(iterate_steps(rows, SETTINGS, after_step, mixture)) == whole[after_step:]


@given(made=mixtures)
def test_totals_are_what_the_steps_come_to_and_near_the_shares(
    made: tuple[list[RowLength], Mixture],
) -> None:
    rows, mixture = made
    steps = list(iterate_steps(rows, SETTINGS, mixture=mixture))
    totals = count_steps(rows, SETTINGS, mixture)
    assert (totals.num_steps, totals.num_tokens) == (len(steps), sum(step.num_tokens for step in steps))
    for source in range(3):
        assert totals.drawn[source].num_rows == sum(step.drawn[source].num_rows for step in steps)
        assert totals.drawn[source].num_tokens == sum(step.drawn[source].num_tokens for step in steps)
    weight = weights(rows, mixture)
    whole = sum(weight[row] for row in rows_in(steps))
    # The error does not grow with the steps: some units of the whole run.
    reached = shares_reached(totals.drawn, mixture)
    for share, asked in zip(reached, mixture.shares, strict=True):
        assert abs(share - asked) * whole <= 2 * max(weight.values())


def test_units_of_several_rows_stay_whole_and_count_once() -> None:
    pairs = [
        RowLength(row=row, num_tokens=5, num_supervised=2, unit=row - row % 2) for row in range(2 * (30 + 10))
    ]
    mixture = Mixture(names=("own", "general"), first_rows=(0, 60), shares=(0.75, 0.25), measure="UNITS")
    settings = replace(SETTINGS, batch_tokens=0, batch_rows=8, num_epochs=1)
    steps = list(iterate_steps(pairs, settings, mixture=mixture))
    assert [[one.num_units for one in step.drawn] for step in steps] == [[6, 2]] * 5
    for step in steps:
        for batch in step.micro_batches:
            assert all(batch[place + 1] == row + 1 for place, row in enumerate(batch) if row % 2 == 0)


def test_a_share_of_a_few_units_is_rounded_and_not_favoured() -> None:
    rows, mixture = mixed((5, 5), (0.99, 0.01), measure="UNITS")
    (own, other) = count_steps(rows, replace(SETTINGS, num_epochs=1), mixture).drawn
    assert (own.num_units, other.num_units) == (5, 0)
    (own, other) = count_steps(rows, replace(SETTINGS, num_epochs=20), mixture).drawn
    assert (own.num_units, other.num_units) == (100, 1)


def test_without_a_mixture_steps_and_digest_are_those_of_before() -> None:
    settings = replace(SETTINGS, num_epochs=2, batch_tokens=64, micro_batch_tokens=48)
    rows = [RowLength(row=row, num_tokens=3 + row * 7 % 20, num_supervised=1 + row % 2) for row in range(12)]
    validation = [RowLength(row=row, num_tokens=9, num_supervised=3) for row in range(12, 15)]
    assert (
        plan_digest(rows, validation, settings)
        == "95e0af210872680327743bdaa09b9adac3bec1e241d463d969303057c46f1d4e"
    )
    batches = repr([step.micro_batches for step in iterate_steps(rows, settings)])
    assert (
        hashlib.sha256(batches.encode()).hexdigest()
        == "b6af94b49a3fbfc923b0d623126068031faccbb1d4403fce7f37bc5cbf5cede4"
    )


def test_plan_digest_knows_shares_and_where_renderings_begin_and_no_names() -> None:
    rows, mixture = mixed((20, 20), (0.5, 0.5))
    digest = plan_digest(rows, (), SETTINGS, mixture)
    assert plan_digest(rows, (), SETTINGS) != digest
    for changed in (
        replace(mixture, shares=(0.6, 0.4)),
        replace(mixture, first_rows=(0, 19)),
        replace(mixture, measure="UNITS"),
    ):
        assert plan_digest(rows, (), SETTINGS, changed) != digest
    assert plan_digest(rows, (), SETTINGS, replace(mixture, names=("other", "names"))) == digest


def test_rows_are_named_by_their_rendering_and_their_number_there() -> None:
    _, mixture = mixed((5, 7), (0.5, 0.5))
    assert row_named(6, mixture) == "1 of general"
    assert rows_named((3, 4, 5, 11, 0), mixture) == "3, 4 of own; 0, 6 of general; 0 of own"
    assert rows_listed((3, 5), mixture) == {"rows": "3,0", "renderings": "own,general"}
    assert (row_named(6, None), rows_named((3, 5), None)) == ("6", "3, 5")
    assert rows_listed((3, 5), None) == {"rows": "3,5"}


def test_first_rows_leave_room_for_all_rows_that_are_read() -> None:
    """Also where the last rows of a rendering are of a split that nobody reads, and where one has no row at all."""
    parts = [
        [PackedLengths.of(rendering(3, 0)), PackedLengths.of(rendering(2, 0, first=7))],
        [PackedLengths(), PackedLengths()],
        [PackedLengths.of(rendering(4, 0)), PackedLengths()],
    ]
    assert first_rows(parts) == (0, 9, 9)
    whole = PackedLengths()
    whole.extend(parts[0][0], 0)
    whole.extend(PackedLengths.of([RowLength(row=1, num_tokens=4, num_supervised=2, unit=0)]), 9)
    assert list(whole)[-1] == RowLength(row=10, num_tokens=4, num_supervised=2, unit=9)


def test_a_survey_looks_at_each_rendering_by_itself() -> None:
    own, general = rendering(20, 1), rendering(8, 2, first=25, longest=60)
    mixture = Mixture(names=("own", "general"), first_rows=(0, 25), shares=(0.8, 0.2), measure="TOKENS")
    validation = rendering(3, 3, first=20)
    found = survey([*own, *general], validation, SETTINGS, mixture)
    alone = survey(own, validation, SETTINGS)
    assert replace(found, mixed=(), totals=None) == replace(alone, totals=None)
    (other,) = found.mixed
    assert (other.num_train_rows, other.num_teaching_rows, other.num_validation_rows) == (8, 8, 0)
    longest = max(general, key=lambda row: row.num_tokens)
    assert other.longest == Longest(num_tokens=longest.num_tokens, row=longest.row - 25)
    assert found.totals == count_steps([*own, *general], SETTINGS, mixture)
    tight = replace(SETTINGS, micro_batch_tokens=40)
    assert survey([*own, *general], validation, tight, mixture).totals is None
    with pytest.raises(
        InvalidArgument,
        match=rf"at least {longest.num_tokens}, the longest row .row {longest.row - 25}. of general",
    ):
        require_fitting(other, tight, 0, of="general")


def test_a_survey_counts_no_steps_where_a_rendering_teaches_nothing() -> None:
    silent = [replace(row, num_supervised=0) for row in rendering(8, 2, first=20)]
    _, mixture = mixed((20, 8), (0.5, 0.5))
    found = survey([*rendering(20, 1), *silent], (), SETTINGS, mixture)
    assert (found.totals, found.mixed[0].longest_train) == (None, None)
