"""What a plan counts, refuses and warns of."""

from __future__ import annotations

from dataclasses import replace

import pytest

from luthier.errors import FailedPrecondition, InvalidArgument, Reason
from luthier.training.jobs import planning
from luthier.training.jobs.planning import (
    Lengths,
    RenderingView,
    SplitCounts,
    UnsupervisedRecord,
    batch_settings,
    make_plan,
    require_usable,
)
from luthier.training.jobs.settings import HyperparametersRequest, JobRequest, JobSettings, resolve
from luthier.training.recipes.batches import RowLength, iterate_steps

RENDERING = RenderingView(name="projects/p/renderings/r", state="READY", digest="d", tokenizer_digest="t")


def settings_of(asked: HyperparametersRequest) -> JobSettings:
    return resolve(
        JobRequest(base_model="projects/p/models/m", rendering=RENDERING.name, hyperparameters=asked)
    )


def rows(*lengths: int, supervised: int = 2) -> tuple[RowLength, ...]:
    return tuple(
        RowLength(row=row, num_tokens=length, num_supervised=supervised) for row, length in enumerate(lengths)
    )


def test_make_plan_counts_what_the_steps_will_use() -> None:
    settings = settings_of(HyperparametersRequest(num_epochs=3, batch_tokens=20, micro_batch_tokens=12))
    lengths = Lengths(train=rows(*range(3, 12)), validation=rows(4, 4))
    plan = make_plan(settings, RENDERING, lengths, 0)
    steps = list(iterate_steps(lengths.train, batch_settings(settings.hyperparameters)))
    assert plan.num_steps == len(steps)
    assert plan.num_tokens == sum(step.num_tokens for step in steps) == 3 * sum(range(3, 12))
    assert plan.num_supervised_tokens == 3 * 9 * 2
    assert (plan.num_train_rows, plan.num_validation_rows) == (9, 2)
    assert plan.packing_efficiency == pytest.approx(plan.num_tokens / (20 * plan.num_steps))
    assert plan.warnings == ()


def test_make_plan_refuses_rows_that_all_teach_nothing_and_names_file_and_line() -> None:
    named = tuple(
        UnsupervisedRecord(filename="train.jsonl", line=line, message="no assistant turn")
        for line in range(4, 14)
    )
    with pytest.raises(FailedPrecondition) as caught:
        make_plan(
            settings_of(HyperparametersRequest()),
            replace(RENDERING, unsupervised_records=named),
            Lengths(train=rows(5, 5, supervised=0), validation=()),
            0,
        )
    assert caught.value.reason == Reason.NO_SUPERVISED_TOKENS
    assert "none of 2 has; the first: train.jsonl line 4: no assistant turn; train.jsonl line 5" in str(
        caught.value
    )
    assert caught.value.metadata["filename"] == "train.jsonl"
    assert caught.value.metadata["line"] == "4"


def test_make_plan_refuses_a_rendering_without_training_rows() -> None:
    with pytest.raises(FailedPrecondition, match=r"must have training rows, it has none \(7 were dropped"):
        make_plan(
            settings_of(HyperparametersRequest()),
            replace(RENDERING, train=SplitCounts(num_dropped=7)),
            Lengths(train=(), validation=rows(3)),
            0,
        )


def test_make_plan_refuses_more_epochs_than_it_can_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "MAX_PASSED_ROWS", 30)
    lengths = Lengths(train=rows(*range(3, 12)), validation=())
    many = HyperparametersRequest(num_epochs=4, batch_tokens=20, micro_batch_tokens=12)
    with pytest.raises(
        InvalidArgument, match="num_epochs must be at most 3 for 9 training rows, got 4"
    ) as caught:
        make_plan(settings_of(many), RENDERING, lengths, 0)
    assert [one.field for one in caught.value.violations] == ["fine_tuning_job.hyperparameters.num_epochs"]
    few = replace(many, max_steps=10)
    for asked in (few, replace(few, batch_tokens=None, batch_rows=2)):
        assert make_plan(settings_of(asked), RENDERING, lengths, 0).num_steps == 10


def test_make_plan_refuses_batches_smaller_than_the_longest_row() -> None:
    settings = settings_of(HyperparametersRequest(batch_tokens=9, micro_batch_tokens=8))
    with pytest.raises(InvalidArgument) as caught:
        make_plan(settings, RENDERING, Lengths(train=rows(3, 10), validation=rows(11)), 0)
    assert caught.value.reason == Reason.SEQUENCE_TOO_LONG
    assert caught.value.message == (
        "hyperparameters.micro_batch_tokens must be at least 11, the longest row, got 8; "
        "hyperparameters.batch_tokens must be at least 10, the longest row, got 9"
    )


def test_make_plan_refuses_rows_beyond_the_models_context() -> None:
    with pytest.raises(
        FailedPrecondition, match=r"at most the base model's 8 tokens, row 1 has 10"
    ) as caught:
        make_plan(
            settings_of(HyperparametersRequest()),
            RENDERING,
            Lengths(train=rows(3, 10), validation=()),
            8,
        )
    assert caught.value.reason == Reason.SEQUENCE_TOO_LONG


def test_make_plan_warns_of_what_a_user_would_want_to_change() -> None:
    view = replace(
        RENDERING,
        train=SplitCounts(num_dropped=1, num_truncated=2, num_unsupervised=3),
        unsupervised_records=(UnsupervisedRecord(filename="a.jsonl", line=9, message="weight 0"),),
        warnings=("the end-of-turn token is not learnt",),
    )
    asked = HyperparametersRequest(warmup_steps=50, max_steps=40, batch_tokens=4096)
    plan = make_plan(settings_of(asked), view, Lengths(train=rows(5, 5), validation=()), 0)
    assert [warning.split(",")[0].split(":")[0] for warning in plan.warnings] == [
        "3 training records have no supervised token and are not used",
        "1 training records are longer than the rendering's max_tokens and left out",
        "2 training records are cut at max_tokens of the rendering",
        "there are no validation rows",
        "warmup_steps is 50 and there are 1 steps",
        "max_steps is 40 and num_epochs 1 ends after 1 steps; raise num_epochs to go on",
        "steps are filled to 0% of batch_tokens; batch_rows or another batch_tokens may fit the rows better",
        "the end-of-turn token is not learnt",
    ]
    assert "a.jsonl line 9: weight 0" in plan.warnings[0]


def test_require_usable_refuses_a_rendering_that_is_not_ready_or_of_another_tokenizer() -> None:
    require_usable(RENDERING, "m", "t")
    failed = replace(RENDERING, state="FAILED", failure_message="the template is not valid")
    with pytest.raises(FailedPrecondition, match=r"must be READY, it is FAILED: the template is not valid"):
        require_usable(failed, "m", "t")
    with pytest.raises(
        FailedPrecondition, match=r"tokenizer of m \(digest other\), it was made with digest t"
    ):
        require_usable(RENDERING, "m", "other")
