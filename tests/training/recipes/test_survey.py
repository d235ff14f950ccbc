"""What fits and what does not, where units have several rows."""

from __future__ import annotations

import pytest

from luthier.errors import FailedPrecondition, InvalidArgument, Reason
from luthier.training.recipes.batches import BatchSettings, RowLength
from luthier.training.recipes.survey import Longest, PackedLengths, require_fitting, survey


def batches(**changes: int) -> BatchSettings:
    settings = {
        "seed": 3,
        "num_epochs": 1,
        "max_steps": 0,
        "batch_tokens": 64,
        "batch_rows": 0,
        "micro_batch_tokens": 64,
    }
    return BatchSettings(**{**settings, **changes})


def unit(first: int, *num_tokens: int, num_supervised: int = 1) -> list[RowLength]:
    """Rows of one unit, of which the last alone teaches."""
    last = len(num_tokens) - 1
    return [
        RowLength(
            row=first + place,
            num_tokens=tokens,
            num_supervised=num_supervised if place == last else 0,
            unit=first,
        )
        for place, tokens in enumerate(num_tokens)
    ]


def test_a_unit_is_as_long_as_its_rows_and_its_longest_row_is_what_the_context_must_hold() -> None:
    rows = [*unit(0, 30, 30), *unit(2, 40), *unit(3, 1, 2, 3), *unit(6, 90, num_supervised=0)]
    found = survey(rows, unit(7, 10, 45), batches())
    assert (found.num_train_rows, found.num_validation_rows) == (7, 2)
    assert found.longest_train == found.longest == Longest(num_tokens=60, row=0, num_rows=2)
    assert found.longest_row == Longest(num_tokens=45, row=8)
    assert found.totals is not None
    assert (found.totals.num_rows, found.totals.num_tokens) == (6, 106)
    require_fitting(found, batches(), context_length=45)


def test_a_row_that_teaches_nothing_counts_where_its_unit_teaches() -> None:
    found = survey(unit(0, 50, 5), (), batches())
    assert found.longest_row == Longest(num_tokens=50, row=0)
    with pytest.raises(
        FailedPrecondition, match="at most the base model's 49 tokens, row 0 has 50"
    ) as caught:
        require_fitting(found, batches(), context_length=49)
    assert (caught.value.reason, caught.value.metadata["rows"]) == (Reason.SEQUENCE_TOO_LONG, "0")


@pytest.mark.parametrize(
    ("changes", "fields"),
    [
        ({"micro_batch_tokens": 59}, ["micro_batch_tokens"]),
        ({"batch_tokens": 59}, ["batch_tokens"]),
        ({"micro_batch_tokens": 59, "batch_tokens": 59}, ["micro_batch_tokens", "batch_tokens"]),
        ({"micro_batch_tokens": 59, "batch_tokens": 0, "batch_rows": 2}, ["micro_batch_tokens"]),
    ],
)
def test_a_unit_that_fits_no_pass_or_step_is_refused_whole_and_nothing_is_counted(
    changes: dict[str, int], fields: list[str]
) -> None:
    settings = batches(**changes)
    found = survey([*unit(0, 30, 30), *unit(2, 40)], (), settings)
    assert found.totals is None
    with pytest.raises(
        InvalidArgument, match=r"at least 60, the longest unit, of 2 rows \(from row 0 on\), got 59"
    ) as caught:
        require_fitting(found, settings, context_length=0)
    assert caught.value.metadata == {"rows": "0"}
    assert caught.value.reason == Reason.SEQUENCE_TOO_LONG
    named = [violation.field for violation in caught.value.violations]
    assert named == [f"fine_tuning_job.hyperparameters.{field}" for field in fields]


def test_a_unit_of_validation_has_to_fit_a_pass_and_no_step() -> None:
    settings = batches(batch_tokens=50, micro_batch_tokens=60)
    found = survey(unit(0, 20, 20), unit(2, 30, 30), settings)
    assert found.longest == Longest(num_tokens=60, row=2, num_rows=2)
    assert found.totals is not None
    require_fitting(found, settings, context_length=0)
    with pytest.raises(
        InvalidArgument, match="micro_batch_tokens must be at least 60, the longest unit, of 2"
    ):
        require_fitting(found, batches(batch_tokens=50, micro_batch_tokens=59), context_length=0)


def test_prompts_are_planned_with_the_longest_answer_that_may_be_sampled() -> None:
    prompts = PackedLengths.of(
        RowLength(row=row, num_tokens=tokens, num_supervised=0) for row, tokens in ((0, 5), (1, 0), (2, 9))
    )
    settings = batches(batch_tokens=0, batch_rows=2)
    found = survey(prompts.with_answers(20), (), settings)
    assert found.longest_row == Longest(num_tokens=29, row=2)
    assert found.totals is not None
    assert (found.totals.num_rows, found.totals.num_steps) == (2, 1)  # one has no token
    assert (found.totals.num_tokens, found.totals.num_supervised) == (5 + 9 + 40, 40)
    with pytest.raises(InvalidArgument, match="micro_batch_tokens must be at least 65"):
        require_fitting(survey(prompts.with_answers(56), (), settings), settings, context_length=0)
    assert next(iter(prompts.with_answers(20))) == RowLength(row=0, num_tokens=25, num_supervised=20)
