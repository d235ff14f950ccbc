"""What an adapter may be, as far as it shows without its model."""

from __future__ import annotations

import math
from typing import Any

import pytest
from tests.training.jobs.test_rules import job

from luthier.errors import InvalidArgument
from luthier.lm import trained_weights
from luthier.training.jobs.adaptation import TRAINABLE
from luthier.training.jobs.rules import check_job, resolved
from luthier.v1.fine_tuning_job_pb2 import LoraConfig, RewardModelConfig


@pytest.mark.parametrize(
    ("lora", "field", "message"),
    [
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern", "the value of 'q_proj' must be in 1..512, got 0"),
        (
            {"rank_pattern": {"q_proj": 513}},
            "rank_pattern",
            "the value of 'q_proj' must be in 1..512, got 513",
        ),
        (
            {"alpha_pattern": {"q_proj": math.inf}},
            "alpha_pattern",
            "the value of 'q_proj' must be above 0 and at most 1e+06, got inf",
        ),
        ({"rank_pattern": {"": 4}}, "rank_pattern", "the pattern '' must have 1 to 200 characters, got 0"),
        (
            {"alpha_pattern": {r"(q)\1": 4}},
            "alpha_pattern",
            r"the pattern '(q)\\1' must be a regular expression of Python and of RE2: ",
        ),
        (
            {"rank_pattern": {f"layers.{number}": 4 for number in range(65)}},
            "rank_pattern",
            "must hold at most 64 patterns, got 65",
        ),
    ],
)
def test_check_refuses_patterns_by_name(lora: dict[str, Any], field: str, message: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        check_job(job(lora=LoraConfig(**lora)))
    (violation,) = caught.value.violations
    assert violation.field == f"fine_tuning_job.lora.{field}"
    assert violation.description.startswith(message)


def test_a_rank_by_pattern_leaves_alpha_as_it_is() -> None:
    filled = resolved(job(lora=LoraConfig(rank=4, rank_pattern={"q_proj": 64})))
    assert (filled.lora.alpha, dict(filled.lora.alpha_pattern)) == (8.0, {})
    check_job(filled)


@pytest.mark.parametrize(
    ("changes", "field", "message"),
    [
        (
            {"lora": LoraConfig(use_dora=True, dropout=0.1)},
            "dropout",
            "must be 0 with use_dora, got 0.1",
        ),
        (
            {"lora": LoraConfig(lora_plus_ratio=0.5)},
            "lora_plus_ratio",
            "must be 0 or in [1, 1000], got 0.5",
        ),
        (
            {"lora": LoraConfig(lora_plus_ratio=1001)},
            "lora_plus_ratio",
            "must be 0 or in [1, 1000], got 1001.0",
        ),
        (
            {"lora": LoraConfig(trained_modules=["norm"])},
            "trained_modules[0]",
            "must be embed_tokens or lm_head, got 'norm'",
        ),
        (
            {"lora": LoraConfig(trained_modules=["lm_head", "lm_head"])},
            "trained_modules",
            "must name each module once, got ['lm_head', 'lm_head']",
        ),
        (
            {"lora": LoraConfig(trained_modules=["lm_head"]), "reward_model": RewardModelConfig()},
            "trained_modules",
            "must not name lm_head with reward_model: a reward model has no head over words",
        ),
    ],
)
def test_check_refuses_modules_to_train_whole_by_name(
    changes: dict[str, Any], field: str, message: str
) -> None:
    with pytest.raises(InvalidArgument) as caught:
        check_job(job(**changes))
    (violation,) = caught.value.violations
    assert (violation.field, violation.description) == (f"fine_tuning_job.lora.{field}", message)


def test_the_service_and_its_workers_train_the_same_modules_whole() -> None:
    """The service has no torch, and so a list of its own."""
    assert TRAINABLE == trained_weights.TRAINABLE
    check_job(job(lora=LoraConfig(trained_modules=TRAINABLE)))
