"""The batch plan: complete, seeded, within its limits, the same wherever it is computed."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from luthier.training.recipes.batches import (
    BatchSettings,
    RowLength,
    count_steps,
    iterate_steps,
    pack_first_fit,
    plan_digest,
    teaching_units,
)

SETTINGS = BatchSettings(
    seed=7, num_epochs=2, max_steps=0, batch_tokens=64, batch_rows=0, micro_batch_tokens=48
)


def some_rows(count: int, seed: int = 0, longest: int = 40) -> list[RowLength]:
    draw = random.Random(seed)
    rows = []
    for row in range(count):
        num_tokens = draw.randint(2, longest)
        rows.append(
            RowLength(row=row * 3, num_tokens=num_tokens, num_supervised=draw.randint(0, num_tokens - 1))
        )
    return rows


rows_strategy = st.builds(some_rows, st.integers(1, 60), st.integers(0, 1000))


@given(rows=rows_strategy, seed=st.integers(-5, 5))
def test_iterate_steps_uses_every_teaching_row_once_an_epoch(rows: list[RowLength], seed: int) -> None:
    steps = list(iterate_steps(rows, replace(SETTINGS, seed=seed)))
    for epoch in range(2):
        used = [row for step in steps if step.epoch == epoch for batch in step.micro_batches for row in batch]
        assert sorted(used) == [row.row for row in rows if row.num_supervised > 0]


@given(rows=rows_strategy)
def test_iterate_steps_keeps_steps_and_micro_batches_within_their_limits(rows: list[RowLength]) -> None:
    tokens = {row.row: row.num_tokens for row in rows}
    for step in iterate_steps(rows, SETTINGS):
        assert step.num_tokens == sum(tokens[row] for batch in step.micro_batches for row in batch)
        assert step.num_tokens <= 64
        assert all(sum(tokens[row] for row in batch) <= 48 for batch in step.micro_batches)
        assert step.num_supervised > 0


@given(rows=rows_strategy, after_step=st.integers(0, 30))
def test_iterate_steps_after_a_step_is_the_tail_of_the_whole(rows: list[RowLength], after_step: int) -> None:
    whole = list(iterate_steps(rows, SETTINGS))
    assert list(iterate_steps(rows, SETTINGS, after_step)) == whole[after_step:]


def test_iterate_steps_with_batch_rows_takes_that_many_rows() -> None:
    rows = [RowLength(row=row, num_tokens=10, num_supervised=5) for row in range(10)]
    settings = replace(SETTINGS, batch_tokens=0, batch_rows=4, num_epochs=1)
    steps = list(iterate_steps(rows, settings))
    assert [sum(len(batch) for batch in step.micro_batches) for step in steps] == [4, 4, 2]
    assert [step.epochs_done for step in steps] == [1 / 3, 2 / 3, 1.0]
    assert count_steps(rows, settings).packing_efficiency == 1.0


def test_iterate_steps_shuffles_by_seed_and_epoch_and_nothing_else() -> None:
    rows = some_rows(30)

    def order(seed: int, epoch: int) -> list[int]:
        steps = iterate_steps(rows, replace(SETTINGS, seed=seed))
        return [row for step in steps if step.epoch == epoch for batch in step.micro_batches for row in batch]

    assert order(7, 0) == order(7, 0)
    assert order(7, 0) != order(7, 1)
    assert order(7, 0) != order(8, 0)


def test_iterate_steps_gives_the_order_that_earlier_versions_gave() -> None:
    rows = [RowLength(row=row, num_tokens=8, num_supervised=4) for row in range(8)]
    settings = replace(SETTINGS, batch_tokens=16, micro_batch_tokens=16, num_epochs=1)
    order = [step.micro_batches for step in iterate_steps(rows, settings)]
    assert order == [((5, 1),), ((2, 6),), ((0, 3),), ((4, 7),)]


def test_iterate_steps_ends_at_max_steps() -> None:
    rows = some_rows(30)
    settings = replace(SETTINGS, max_steps=5)
    assert [step.step for step in iterate_steps(rows, settings)] == [1, 2, 3, 4, 5]
    assert count_steps(rows, settings).num_steps == 5


@given(rows=rows_strategy)
def test_count_steps_equals_what_the_steps_come_to(rows: list[RowLength]) -> None:
    steps = list(iterate_steps(rows, SETTINGS))
    totals = count_steps(rows, SETTINGS)
    assert totals.num_steps == len(steps)
    assert totals.num_tokens == sum(step.num_tokens for step in steps)
    assert totals.num_supervised == sum(step.num_supervised for step in steps)
    assert totals.num_steps_per_epoch == Counter(step.epoch for step in steps)[0]
    assert 0 < totals.packing_efficiency <= 1


def test_count_steps_of_rows_that_teach_nothing_is_zero() -> None:
    rows = [RowLength(row=0, num_tokens=5, num_supervised=0)]
    assert count_steps(rows, SETTINGS).num_steps == 0


def test_pack_first_fit_fills_earlier_groups_first() -> None:
    lengths = [6, 5, 4, 3, 2]
    rows = [RowLength(row=row, num_tokens=length, num_supervised=1) for row, length in enumerate(lengths)]
    assert pack_first_fit(teaching_units(rows), 10) == ((0, 2), (1, 3, 4))


@given(lengths=st.lists(st.integers(1, 48), max_size=60))
def test_pack_first_fit_is_first_fit(lengths: list[int]) -> None:
    rows = [RowLength(row=row, num_tokens=length, num_supervised=1) for row, length in enumerate(lengths)]
    groups: list[list[int]] = []
    for row in rows:
        fitting = (g for g in groups if sum(lengths[other] for other in g) + row.num_tokens <= 48)
        group = next(fitting, None)
        if group is None:
            group = []
            groups.append(group)
        group.append(row.row)
    assert pack_first_fit(teaching_units(rows), 48) == tuple(map(tuple, groups))


def test_plan_digest_changes_with_rows_split_and_settings() -> None:
    rows = some_rows(5)
    digests = {
        plan_digest(rows, [], SETTINGS),
        plan_digest([], rows, SETTINGS),
        plan_digest(rows[:-1], [], SETTINGS),
        plan_digest(rows, [], replace(SETTINGS, seed=8)),
    }
    assert len(digests) == 4
    assert plan_digest(rows, [], SETTINGS) == plan_digest(list(rows), [], SETTINGS)


def pairs(count: int, num_tokens: int = 10) -> list[RowLength]:
    """Units of two rows, of which only one teaches."""
    return [
        RowLength(row=row, num_tokens=num_tokens + row % 3, num_supervised=row % 2 * 4, unit=row - row % 2)
        for row in range(2 * count)
    ]


@given(count=st.integers(1, 40), seed=st.integers(0, 5))
def test_iterate_steps_never_cuts_a_unit_and_counts_all_its_tokens(count: int, seed: int) -> None:
    rows = pairs(count)
    tokens = {row.row: row.num_tokens for row in rows}
    for step in iterate_steps(rows, replace(SETTINGS, seed=seed)):
        for batch in step.micro_batches:
            assert [row + 1 for row in batch[::2]] == list(batch[1::2])
            assert all(row % 2 == 0 for row in batch[::2])
            assert sum(tokens[row] for row in batch) <= SETTINGS.micro_batch_tokens
        assert step.num_tokens == sum(tokens[row] for batch in step.micro_batches for row in batch)
    totals = count_steps(rows, replace(SETTINGS, num_epochs=1))
    assert (totals.num_rows, totals.num_tokens) == (2 * count, sum(tokens.values()))


def test_iterate_steps_with_batch_rows_takes_that_many_units() -> None:
    settings = replace(SETTINGS, batch_tokens=0, batch_rows=3, num_epochs=1)
    steps = list(iterate_steps(pairs(7), settings))
    assert [sum(len(batch) for batch in step.micro_batches) for step in steps] == [6, 6, 2]


def test_a_unit_without_a_supervised_token_is_passed_over_whole() -> None:
    idle = [RowLength(row=row, num_tokens=5, num_supervised=0, unit=20) for row in (20, 21)]
    used = {
        row
        for step in iterate_steps(pairs(2) + idle, SETTINGS)
        for batch in step.micro_batches
        for row in batch
    }
    assert used == {0, 1, 2, 3}


def test_plan_digest_of_rows_by_themselves_is_that_of_before_units_and_changes_with_them() -> None:
    rows = [RowLength(row=row, num_tokens=9, num_supervised=4) for row in range(4)]
    alone = [replace(row, unit=row.row) for row in rows]
    joined = [replace(row, unit=row.row - row.row % 2) for row in rows]
    assert plan_digest(rows, [], SETTINGS) == plan_digest(alone, [], SETTINGS)
    assert (
        plan_digest(rows, [], SETTINGS) == "2b52cf3d13b7a222976d966e00b2b35551b1df618b0ebbece0a1cf521a93a787"
    )
    assert plan_digest(joined, [], SETTINGS) != plan_digest(rows, [], SETTINGS)
