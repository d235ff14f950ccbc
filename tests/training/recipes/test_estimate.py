"""What a plan says within seconds is what the run counts, or near it where counting all would take too long."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from luthier.training.recipes.batches import BatchSettings, PlanTotals, RowLength
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
