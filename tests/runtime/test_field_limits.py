"""Limits and defaults by field path: what counts as said, what is refused, what is filled in."""

from __future__ import annotations

import math
from typing import Any

import pytest

from luthier.runtime.field_limits import Limit, fill_defaults, limit_violations, not_negative, positive, whole
from luthier.v1.fine_tuning_job_pb2 import FineTuningJob, Hyperparameters, LoraConfig

LIMITS = {
    "lora.rank": whole(1, 8),
    "hyperparameters.num_epochs": whole(1, 8),
    "hyperparameters.batch_rows": whole(1, 8),
    "hyperparameters.batch_tokens": whole(1, 8),
}


def refused(job: FineTuningJob) -> dict[str, str]:
    return {one.field: one.description for one in limit_violations(job, LIMITS, "job")}


@pytest.mark.parametrize(
    ("limit", "allowed", "refused"),
    [
        (whole(1, 8), (1, 8), (0, 9, -1)),
        (positive(2.0), (1e-9, 2.0), (0.0, 2.1, -1.0, math.nan, math.inf)),
        (not_negative(2.0), (0.0, 2.0), (2.1, -0.1, math.nan, math.inf)),
    ],
)
def test_a_limit_allows_what_it_says(
    limit: Limit, allowed: tuple[Any, ...], refused: tuple[Any, ...]
) -> None:
    assert [value for value in allowed if not limit.allows(value)] == []
    assert [value for value in refused if limit.allows(value)] == []


def test_what_is_not_said_is_within_every_limit() -> None:
    assert refused(FineTuningJob()) == {}
    assert refused(FineTuningJob(hyperparameters=Hyperparameters(num_epochs=0))) == {}


def test_a_field_that_knows_presence_is_refused_at_zero() -> None:
    wrong = FineTuningJob(
        lora=LoraConfig(rank=0), hyperparameters=Hyperparameters(batch_rows=0, num_epochs=-1)
    )
    assert refused(wrong) == {
        "job.lora.rank": "lora.rank must be in 1..8, got 0",
        "job.hyperparameters.num_epochs": "hyperparameters.num_epochs must be in 1..8, got -1",
        "job.hyperparameters.batch_rows": "hyperparameters.batch_rows must be in 1..8, got 0",
    }


def test_looking_at_limits_sets_nothing() -> None:
    job = FineTuningJob()
    refused(job)
    assert not job.HasField("lora")
    assert not job.ListFields()


def test_defaults_fill_what_is_not_said_and_nothing_else() -> None:
    job = FineTuningJob(lora=LoraConfig(rank=0))
    fill_defaults(job, {"lora.rank": 16, "lora.alpha": 2.0, "max_checkpoints": 3})
    assert job == FineTuningJob(lora=LoraConfig(rank=0, alpha=2.0), max_checkpoints=3)


def test_a_path_that_is_no_field_is_a_fault() -> None:
    with pytest.raises((AttributeError, KeyError)):
        list(limit_violations(FineTuningJob(), {"lora.width": whole(1, 2)}, "job"))
