"""Defaults and limits of a job's settings."""

from __future__ import annotations

import math
from typing import Any

import pytest

from luthier.errors import InvalidArgument
from luthier.training.jobs.rules import check_job, resolved
from luthier.v1.device_pb2 import Requirements
from luthier.v1.fine_tuning_job_pb2 import (
    LEARNING_RATE_SCHEDULE_COSINE,
    LEARNING_RATE_SCHEDULE_LINEAR,
    FineTuningJob,
    Hyperparameters,
    LoraConfig,
)


def job(**changes: Any) -> FineTuningJob:
    return FineTuningJob(base_model="projects/p/models/m", rendering="projects/p/renderings/r", **changes)


def test_resolved_fills_in_every_default() -> None:
    filled = resolved(job())
    assert (filled.lora.rank, filled.lora.alpha) == (16, 32.0)
    chosen = filled.hyperparameters
    assert (chosen.num_epochs, chosen.batch_tokens, chosen.batch_rows) == (1, 4096, 0)
    assert (chosen.learning_rate, chosen.max_grad_norm) == (2e-4, 1.0)
    assert (chosen.micro_batch_tokens, chosen.activation_checkpointing) == (0, 0), "the worker chooses"
    assert chosen.learning_rate_schedule == LEARNING_RATE_SCHEDULE_COSINE
    assert (filled.checkpoint_interval_steps, filled.max_checkpoints) == (25, 3)
    check_job(filled)


def test_resolved_keeps_what_was_said_and_changes_no_argument() -> None:
    said = resolved(job())
    said.hyperparameters.learning_rate_schedule = LEARNING_RATE_SCHEDULE_LINEAR
    said.hyperparameters.num_epochs = said.hyperparameters.batch_rows = 7
    said.lora.alpha = 3.0
    asked = job(name="mine")
    assert resolved(said) == said
    assert not resolved(asked).name
    assert asked == job(name="mine")


def test_resolved_takes_alpha_from_the_rank_that_was_asked_for() -> None:
    assert resolved(job(lora=LoraConfig(rank=4))).lora.alpha == 8.0


def test_resolved_keeps_a_batch_of_rows_and_no_clipping() -> None:
    asked = Hyperparameters(batch_rows=8, max_grad_norm=0.0)
    chosen = resolved(job(hyperparameters=asked)).hyperparameters
    assert (chosen.batch_rows, chosen.batch_tokens, chosen.max_grad_norm) == (8, 0, 0.0)


@pytest.mark.parametrize("rank", [0, -1, 513])
def test_check_refuses_a_rank_out_of_range(rank: int) -> None:
    with pytest.raises(InvalidArgument) as caught:
        check_job(job(lora=LoraConfig(rank=rank)))
    assert caught.value.message == f"fine_tuning_job.lora.rank: must be in 1..512, got {rank}"
    assert [violation.field for violation in caught.value.violations] == ["fine_tuning_job.lora.rank"]
    assert caught.value.reason == "INVALID_FIELD"


@pytest.mark.parametrize("dropout", [1.0, -0.1, math.nan])
def test_check_refuses_a_dropout_that_leaves_nothing(dropout: float) -> None:
    with pytest.raises(InvalidArgument) as caught:
        check_job(job(lora=LoraConfig(dropout=dropout)))
    assert caught.value.message == f"fine_tuning_job.lora.dropout: must be in [0, 1), got {dropout}"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate: must be above 0 and at most 1000, got 0.0"),
        ({"learning_rate": math.nan}, "learning_rate: must be above 0 and at most 1000, got nan"),
        ({"learning_rate": math.inf}, "learning_rate: must be above 0 and at most 1000, got inf"),
        ({"num_epochs": -1}, "num_epochs: must be in 1..10000, got -1"),
        ({"batch_tokens": 0}, "batch_tokens: must be in 1..16777216, got 0"),
        ({"batch_rows": 0}, "batch_rows: must be in 1..65536, got 0"),
        ({"weight_decay": -0.1}, "weight_decay: must be in 0..1000, got -0.1"),
        ({"max_grad_norm": -1.0}, "max_grad_norm: must be in 0..1e+09, got -1.0"),
        ({"warmup_steps": -3}, "warmup_steps: must be in 0..10000000, got -3"),
    ],
)
def test_check_says_what_a_hyperparameter_must_be(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        check_job(job(hyperparameters=Hyperparameters(**asked)))
    assert caught.value.message == f"fine_tuning_job.hyperparameters.{message}"


@pytest.mark.parametrize("memory", [-1, 1 << 51])
def test_check_refuses_a_memory_that_cannot_be(memory: int) -> None:
    with pytest.raises(InvalidArgument) as caught:
        check_job(job(requirements=Requirements(min_memory_bytes=memory)))
    field = "fine_tuning_job.requirements.min_memory_bytes"
    assert caught.value.message == f"{field}: must be in 0..{1 << 50}, got {memory}"


def test_check_names_all_wrong_fields_at_once() -> None:
    wrong = job(
        display_name="\x1b" + "x" * 199,
        labels={"Bad Key": "a"},
        tuned_model_id="Upper",
        lora=LoraConfig(rank=0, target_modules=[""]),
        hyperparameters=Hyperparameters(learning_rate=-1.0, max_steps=-1),
        checkpoint_interval_steps=-1,
        validation_interval_steps=-2,
    )
    with pytest.raises(InvalidArgument) as caught:
        check_job(wrong)
    assert [violation.field.removeprefix("fine_tuning_job.") for violation in caught.value.violations] == [
        "display_name",
        "tuned_model_id",
        "lora.target_modules[0]",
        "lora.rank",
        "hyperparameters.max_steps",
        "hyperparameters.learning_rate",
        "checkpoint_interval_steps",
        "validation_interval_steps",
        "labels",
    ]
