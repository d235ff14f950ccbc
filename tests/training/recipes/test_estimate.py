"""What a plan says within seconds is what the run counts, or near it where counting all would take too long."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from luthier.training.recipes import estimate
from luthier.training.recipes.batches import BatchSettings, PlanTotals, RowLength, count_steps
from luthier.training.recipes.estimate import quick_survey
from luthier.training.recipes.mixture import Measure, Mixture
from luthier.training.recipes.survey import PackedLengths, survey

SETTINGS = BatchSettings(
    seed=3, num_epochs=12, max_steps=0, batch_tokens=256, batch_rows=0, micro_batch_tokens=96
)


def drawn(count: int, seed: int, *, unit: int = 1, first: int = 0, idle: float = 0.1) -> PackedLengths:
    """Rows of 1 to 30 tokens, some of which teach nothing, in units of `unit` rows."""
    draw = random.Random(seed)
    return PackedLengths.of(
        RowLength(
            row=first + row,
            num_tokens=draw.randint(1, 30),
            num_supervised=0 if draw.random() < idle else draw.randint(1, 9),
            unit=first + row - row % unit,
        )
        for row in range(count)
    )


def mixed(counts: tuple[int, ...], measure: Measure) -> tuple[PackedLengths, PackedLengths, Mixture]:
    """Training and validation rows of several renderings, numbered through."""
    train, validation, firsts = PackedLengths(), PackedLengths(), [0]
    for number, count in enumerate(counts):
        train.extend(drawn(count, number, unit=1 + number % 2), firsts[-1])
        validation.extend(drawn(count // 5, 9 + number, first=count, unit=1 + number % 2), firsts[-1])
        firsts.append(firsts[-1] + count + count // 5)
    shares = (0.5, 0.3, 0.2)[: len(counts)]
    names = tuple(f"r{number}" for number in range(len(counts)))
    whole = sum(shares)
    mixture = Mixture(
        names=names,
        first_rows=tuple(firsts[:-1]),
        shares=tuple(share / whole for share in shares),
        measure=measure,
    )
    return train, validation, mixture


@pytest.mark.parametrize("unit", [1, 2, 3])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"max_steps": 7},
        {"batch_tokens": 0, "batch_rows": 4},
        {"micro_batch_tokens": 0},
        {"micro_batch_tokens": 20},
        {"batch_tokens": 20},
    ],
    ids=str,
)
def test_it_is_the_survey_where_few_rows_pass(unit: int, seed: int, changes: dict[str, int]) -> None:
    settings = replace(SETTINGS, **changes)
    for count in (0, 1, 37, 90):
        train, validation = (
            drawn(count, seed, unit=unit),
            drawn(count // 3, 50 + seed, unit=unit, first=count),
        )
        assert quick_survey(train, validation, settings) == survey(train, validation, settings)


@pytest.mark.parametrize("idle", [0.0, 1.0])
def test_it_is_the_survey_where_all_or_none_teach(idle: float) -> None:
    train, validation = drawn(40, 1, idle=idle), drawn(9, 2, first=40, idle=1 - idle)
    assert quick_survey(train, validation, SETTINGS) == survey(train, validation, SETTINGS)


@pytest.mark.parametrize("measure", ["UNITS", "TOKENS"])
@pytest.mark.parametrize("counts", [(60, 20), (20, 60, 33)])
def test_it_is_the_survey_of_a_mixture_where_few_rows_pass(counts: tuple[int, ...], measure: Measure) -> None:
    train, validation, mixture = mixed(counts, measure)
    found = quick_survey(train, validation, SETTINGS, mixture)
    assert found == survey(train, validation, SETTINGS, mixture)
    assert found.totals is not None
    assert len(found.mixed) == len(counts) - 1
    assert found.totals.num_counted_steps == 0


def both(
    train: PackedLengths, settings: BatchSettings, most_counted: int, mixture: Mixture | None = None
) -> tuple[PlanTotals, PlanTotals]:
    """What is estimated, and what is so."""
    estimated = quick_survey(train, PackedLengths(), settings, mixture, most_counted).totals
    counted = survey(train, PackedLengths(), settings, mixture).totals
    assert estimated is not None
    assert counted is not None
    assert sum(estimated.passes.values()) == estimated.num_steps
    assert 0 not in estimated.passes.values()
    return estimated, counted


def check_near(estimated: PlanTotals, counted: PlanTotals, within: float) -> None:
    for name in (
        "num_steps",
        "num_steps_per_epoch",
        "num_tokens",
        "num_supervised",
        "num_seen",
        "packing_efficiency",
    ):
        assert getattr(estimated, name) == pytest.approx(getattr(counted, name), rel=within), name
    assert estimated.num_rows == counted.num_rows
    common = max(counted.passes, key=counted.passes.__getitem__)
    assert estimated.passes[common] == pytest.approx(counted.passes[common], rel=5 * within)
    for one, other in zip(estimated.drawn, counted.drawn, strict=True):
        assert one.num_supervised == pytest.approx(other.num_supervised, rel=5 * within)


Shape = Callable[[], tuple[PackedLengths, Mixture | None]]
SHAPES: dict[str, Shape] = {
    "rows": lambda: (drawn(4000, 1), None),
    "pairs": lambda: (drawn(4000, 1, unit=2), None),
    "a mixture by units": lambda: mixed((2500, 1000, 900), "UNITS")[::2],
    "a mixture by tokens": lambda: mixed((2500, 1000), "TOKENS")[::2],
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("most_counted", [12_000, 1_500], ids=["some epochs", "a part of one"])
def test_an_estimate_is_near_what_is_so(shape: str, most_counted: int) -> None:
    train, mixture = SHAPES[shape]()
    estimated, counted = both(train, SETTINGS, most_counted, mixture)
    assert 0 < estimated.num_counted_steps < counted.num_steps / 3
    check_near(estimated, counted, 0.005 if most_counted > 4000 else 0.02)


@pytest.mark.parametrize("most_counted", [12_000, 1_500])
def test_what_needs_no_estimate_is_exact(most_counted: int) -> None:
    """Each row is seen once in each epoch, and steps of so many rows are no matter of their order."""
    settings = replace(SETTINGS, batch_tokens=0, batch_rows=7)
    estimated, counted = both(drawn(4000, 1), settings, most_counted)
    for name in ("num_steps", "num_steps_per_epoch", "num_tokens", "num_supervised", "num_seen", "num_rows"):
        assert getattr(estimated, name) == getattr(counted, name), name


@pytest.mark.parametrize(
    ("max_steps", "most_counted", "is_exact"),
    [(100, 12_000, True), (2000, 12_000, False), (100, 1_500, False), (10**6, 12_000, False)],
)
def test_the_most_steps_end_an_estimate_too(max_steps: int, most_counted: int, is_exact: bool) -> None:
    estimated, counted = both(drawn(4000, 1), replace(SETTINGS, max_steps=max_steps), most_counted)
    assert (estimated.num_counted_steps == 0) == is_exact
    if is_exact:
        assert estimated == counted
    check_near(estimated, counted, 0.02)
    if max_steps < counted.num_steps + 1:
        assert estimated.num_steps == counted.num_steps == max_steps


@pytest.mark.parametrize("max_steps", [1, 2, 3, 7])
def test_fewer_steps_than_were_counted_have_no_more_passes_than_there_are(max_steps: int) -> None:
    estimated, _ = both(drawn(4000, 1), replace(SETTINGS, max_steps=max_steps), 1_500)
    assert estimated.num_counted_steps > estimated.num_steps == max_steps


def test_a_sample_is_drawn_by_any_seed() -> None:
    settings = replace(SETTINGS, seed=-1)
    check_near(*both(drawn(4000, 1), settings, 1_500), 0.04)


@pytest.mark.parametrize("most_counted", [9_000, 1_500], ids=["some epochs", "a part of one"])
@pytest.mark.parametrize("changes", [{}, {"batch_tokens": 0, "batch_rows": 7}], ids=["tokens", "rows"])
@pytest.mark.parametrize("mixture", [True, False])
def test_no_step_is_larger_than_an_estimate_says(
    mixture: bool, changes: dict[str, int], most_counted: int
) -> None:
    shape = SHAPES["a mixture by units" if mixture else "rows"]
    train, mixed_by = shape()
    settings = replace(SETTINGS, num_epochs=6, **changes)
    estimated, counted = both(train, settings, most_counted, mixed_by)
    assert estimated.num_counted_steps > 0
    assert estimated.largest_step_tokens >= counted.largest_step_tokens
    assert estimated.largest_step_tokens <= 7 * 2 * 30 or not changes


class Counted:
    """Notes how many rows are put in order."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def __call__(self, rows: PackedLengths, settings: BatchSettings, mixture: Mixture | None) -> PlanTotals:
        self.rows.append(len(rows))
        return count_steps(rows, settings, mixture)


@pytest.mark.parametrize("measure", ["UNITS", "TOKENS"])
@pytest.mark.parametrize("max_steps", [0, 20])
@pytest.mark.parametrize(("own", "most_counted"), [(300, 1_500), (3000, 1_500), (300, 12_000)])
def test_of_a_large_rendering_that_is_mixed_in_no_more_is_counted_than_passes(
    own: int, most_counted: int, max_steps: int, measure: Measure, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many rows it has: all of them would be put in order for the few that pass."""
    train, _, mixture = mixed((own, 20_000), measure)
    found = Counted()
    monkeypatch.setattr(estimate, "count_steps", found)
    settings = replace(SETTINGS, num_epochs=2, max_steps=max_steps)
    estimated, counted = both(train, settings, most_counted, mixture)
    assert max(found.rows) <= 1.2 * most_counted
    assert estimated.num_counted_steps > 0
    check_near(estimated, counted, 0.05)


def test_rows_that_teach_nothing_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    train = drawn(20_000, 1, idle=0.95)
    found = Counted()
    monkeypatch.setattr(estimate, "count_steps", found)
    estimated, counted = both(train, SETTINGS, 20_000)
    assert max(found.rows) < 1_500
    assert estimated == counted
