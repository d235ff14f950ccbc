"""Defaults and limits of a job's settings."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from luthier.errors import InvalidArgument
from luthier.training.jobs.domain import LearningRateSchedule
from luthier.training.jobs.settings import HyperparametersRequest, JobRequest, LoraRequest, resolve

REQUEST = JobRequest(base_model="projects/p/models/m", rendering="projects/p/renderings/r")


def test_resolve_fills_in_every_default() -> None:
    settings = resolve(REQUEST)
    assert (settings.lora.rank, settings.lora.alpha) == (16, 32.0)
    chosen = settings.hyperparameters
    assert (chosen.num_epochs, chosen.batch_tokens, chosen.batch_rows) == (1, 4096, 0)
    assert (chosen.micro_batch_tokens, chosen.learning_rate, chosen.max_grad_norm) == (4096, 2e-4, 1.0)
    assert chosen.learning_rate_schedule is LearningRateSchedule.COSINE
    assert settings.checkpoint_interval_steps == 25


def test_resolve_takes_alpha_from_the_rank_that_was_asked_for() -> None:
    assert resolve(replace(REQUEST, lora=LoraRequest(rank=4))).lora.alpha == 8.0


def test_resolve_keeps_a_batch_of_rows_and_no_clipping() -> None:
    asked = HyperparametersRequest(batch_rows=8, max_grad_norm=0.0)
    chosen = resolve(replace(REQUEST, hyperparameters=asked)).hyperparameters
    assert (chosen.batch_rows, chosen.batch_tokens, chosen.max_grad_norm) == (8, 0, 0.0)


@pytest.mark.parametrize("rank", [0, -1, 513])
def test_resolve_refuses_a_rank_out_of_range(rank: int) -> None:
    with pytest.raises(InvalidArgument) as caught:
        resolve(replace(REQUEST, lora=LoraRequest(rank=rank)))
    assert caught.value.message == f"lora.rank must be in 1..512, got {rank}"
    assert [violation.field for violation in caught.value.violations] == ["fine_tuning_job.lora.rank"]
    assert caught.value.reason == "INVALID_FIELD"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"learning_rate": 0.0}, "hyperparameters.learning_rate must be above 0 and at most 1000, got 0.0"),
        (
            {"learning_rate": math.nan},
            "hyperparameters.learning_rate must be above 0 and at most 1000, got nan",
        ),
        (
            {"learning_rate": math.inf},
            "hyperparameters.learning_rate must be above 0 and at most 1000, got inf",
        ),
        ({"num_epochs": -1}, "hyperparameters.num_epochs must be in 1..10000, got -1"),
        ({"batch_tokens": 0}, "hyperparameters.batch_tokens must be in 1..16777216, got 0"),
        ({"batch_rows": 0}, "hyperparameters.batch_rows must be in 1..65536, got 0"),
        ({"weight_decay": -0.1}, "hyperparameters.weight_decay must be in 0..1000, got -0.1"),
        ({"max_grad_norm": -1.0}, "hyperparameters.max_grad_norm must be in 0..1e+09, got -1.0"),
        ({"warmup_steps": -3}, "hyperparameters.warmup_steps must be in 0..10000000, got -3"),
    ],
)
def test_resolve_says_what_a_hyperparameter_must_be(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        resolve(replace(REQUEST, hyperparameters=HyperparametersRequest(**asked)))
    assert caught.value.message == message


def test_resolve_names_all_wrong_fields_at_once() -> None:
    wrong = replace(
        REQUEST,
        display_name="\x1b" + "x" * 199,
        labels={"Bad Key": "a"},
        tuned_model_id="Upper",
        lora=LoraRequest(rank=0, target_modules=("",)),
        hyperparameters=HyperparametersRequest(learning_rate=-1.0, max_steps=-1),
        checkpoint_interval_steps=-1,
        validation_interval_steps=-2,
    )
    with pytest.raises(InvalidArgument) as caught:
        resolve(wrong)
    assert [violation.field.removeprefix("fine_tuning_job.") for violation in caught.value.violations] == [
        "display_name",
        "labels",
        "tuned_model_id",
        "lora.target_modules",
        "lora.rank",
        "hyperparameters.max_steps",
        "hyperparameters.learning_rate",
        "checkpoint_interval_steps",
        "validation_interval_steps",
    ]
