"""What a plan counts, refuses and warns of."""

from __future__ import annotations

from typing import Any

import pytest
from google.rpc.status_pb2 import Status
from tests.training.conftest import with_counts

from luthier.errors import FailedPrecondition, InvalidArgument, Reason
from luthier.training.jobs import planning
from luthier.training.jobs.planning import check_counts, make_plan, require_usable
from luthier.training.jobs.rules import resolved
from luthier.training.recipe_settings import batch_settings
from luthier.training.recipes.batches import RowLength, iterate_steps
from luthier.training.recipes.survey import survey
from luthier.v1.dataset_pb2 import SPLIT_TRAIN
from luthier.v1.fine_tuning_job_pb2 import FineTuningJob, FineTuningPlan, Hyperparameters
from luthier.v1.rendering_pb2 import Rendering, RenderingSplitStatistics, UnsupervisedRecord

NAME = "projects/p/renderings/r"


def rendering(**changes: Any) -> Rendering:
    known = {"name": NAME, "state": Rendering.STATE_READY, "digest": "d", "tokenizer_digest": "t"}
    return Rendering(**{**known, **changes})


RENDERING = rendering()


def job_of(asked: Hyperparameters) -> FineTuningJob:
    return resolved(FineTuningJob(base_model="projects/p/models/m", rendering=NAME, hyperparameters=asked))


def rows(*lengths: int, supervised: int = 2) -> tuple[RowLength, ...]:
    return tuple(
        RowLength(row=row, num_tokens=length, num_supervised=supervised) for row, length in enumerate(lengths)
    )


def plan_of(
    job: FineTuningJob,
    rendering: Rendering,
    train: tuple[RowLength, ...],
    validation: tuple[RowLength, ...] = (),
    context_length: int = 0,
) -> FineTuningPlan:
    """What the service does with a job: its statistics first, then its rows."""
    counted = with_counts(rendering, train, validation)
    check_counts(job, [counted], context_length)
    return make_plan(job, [counted], survey(train, validation, batch_settings(job)), context_length)


def test_make_plan_counts_what_the_steps_will_use() -> None:
    job = job_of(Hyperparameters(num_epochs=3, batch_tokens=20, micro_batch_tokens=12))
    train = rows(*range(3, 12))
    plan = plan_of(job, RENDERING, train, rows(4, 4))
    steps = list(iterate_steps(train, batch_settings(job)))
    assert plan.num_steps == len(steps)
    assert plan.num_tokens == sum(step.num_tokens for step in steps) == 3 * sum(range(3, 12))
    assert plan.num_supervised_tokens == 3 * 9 * 2
    assert (plan.num_train_rows, plan.num_validation_rows) == (9, 2)
    assert plan.packing_efficiency == pytest.approx(plan.num_tokens / (20 * plan.num_steps))
    assert list(plan.warnings) == []
    assert plan.resolved_job == job


def test_make_plan_refuses_rows_that_all_teach_nothing_and_names_file_and_line() -> None:
    named = tuple(
        UnsupervisedRecord(filename="train.jsonl", line=line, message="no assistant turn")
        for line in range(4, 14)
    )
    with pytest.raises(FailedPrecondition) as caught:
        plan_of(
            job_of(Hyperparameters()),
            rendering(unsupervised_records=named),
            rows(5, 5, supervised=0),
        )
    assert caught.value.reason == Reason.NO_SUPERVISED_TOKENS
    assert "none of 2 has; the first: train.jsonl line 4: no assistant turn; train.jsonl line 5" in str(
        caught.value
    )
    assert caught.value.metadata["filename"] == "train.jsonl"
    assert caught.value.metadata["line"] == "4"


def test_make_plan_refuses_a_rendering_without_training_rows() -> None:
    with pytest.raises(FailedPrecondition, match=r"must have training rows, it has none \(7 were dropped"):
        plan_of(
            job_of(Hyperparameters()),
            rendering(split_statistics=[RenderingSplitStatistics(split=SPLIT_TRAIN, num_dropped=7)]),
            (),
            rows(3),
        )


def test_make_plan_refuses_more_epochs_than_it_can_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "MAX_PASSED_ROWS", 30)
    train = rows(*range(3, 12))
    many = Hyperparameters(num_epochs=4, batch_tokens=20, micro_batch_tokens=12)
    with pytest.raises(
        InvalidArgument, match="num_epochs: must be at most 3 for 9 training rows, got 4"
    ) as caught:
        plan_of(job_of(many), RENDERING, train)
    assert [one.field for one in caught.value.violations] == ["fine_tuning_job.hyperparameters.num_epochs"]
    for asked in (
        Hyperparameters(num_epochs=4, batch_tokens=20, micro_batch_tokens=12, max_steps=10),
        Hyperparameters(num_epochs=4, batch_rows=2, micro_batch_tokens=12, max_steps=10),
    ):
        assert plan_of(job_of(asked), RENDERING, train).num_steps == 10


def test_make_plan_refuses_batches_smaller_than_the_longest_row() -> None:
    job = job_of(Hyperparameters(batch_tokens=9, micro_batch_tokens=8))
    with pytest.raises(InvalidArgument) as caught:
        plan_of(job, RENDERING, rows(3, 10), rows(11))
    assert caught.value.reason == Reason.SEQUENCE_TOO_LONG
    assert caught.value.message == (
        "hyperparameters.micro_batch_tokens must be at least 11, the longest row, got 8; "
        "hyperparameters.batch_tokens must be at least 10, the longest row, got 9"
    )


def test_make_plan_refuses_rows_beyond_the_models_context() -> None:
    with pytest.raises(
        FailedPrecondition, match=r"at most the base model's 8 tokens, the longest row has 10"
    ) as caught:
        plan_of(job_of(Hyperparameters()), RENDERING, rows(3, 10), (), 8)
    assert caught.value.reason == Reason.SEQUENCE_TOO_LONG


def test_make_plan_warns_of_what_a_user_would_want_to_change() -> None:
    view = rendering(
        split_statistics=[RenderingSplitStatistics(split=SPLIT_TRAIN, num_dropped=1, num_truncated=2)],
        unsupervised_records=[UnsupervisedRecord(filename="a.jsonl", line=9, message="weight 0")],
        warnings=["the end-of-turn token is not learnt"],
    )
    nothing = rows(5, 5, 5, supervised=0)
    asked = Hyperparameters(warmup_steps=50, max_steps=40, batch_tokens=4096)
    plan = plan_of(job_of(asked), view, (*rows(5, 5), *nothing))
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
    job = FineTuningJob(base_model="m")
    require_usable(job, RENDERING, "t")
    failed = rendering(state=Rendering.STATE_FAILED, error=Status(message="the template is not valid"))
    with pytest.raises(FailedPrecondition, match=r"must be READY, it is FAILED: the template is not valid"):
        require_usable(job, failed, "t")
    with pytest.raises(
        FailedPrecondition, match=r"tokenizer of m \(digest other\), it was made with digest t"
    ):
        require_usable(job, RENDERING, "other")
