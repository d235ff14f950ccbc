"""What a job may say of ranks, and what its plan says of them."""

from __future__ import annotations

from typing import Any

import pytest

from luthier.errors import FailedPrecondition, InvalidArgument
from luthier.v1.base_precision_pb2 import BASE_PRECISION_NF4
from luthier.v1.fine_tuning_job_pb2 import (
    OPTIMISER_STATES_INT8,
    OPTIMISER_STATES_OFFLOADED,
    SHARDING_FSDP2,
    SHARDING_REPLICATED,
    FullConfig,
    Hyperparameters,
    LoraConfig,
    RankRange,
)

FIELD = "fine_tuning_job.ranks"
CUT = {"hyperparameters": Hyperparameters(batch_tokens=40, micro_batch_tokens=10)}
"""Steps of four passes of a row each."""


@pytest.mark.parametrize(
    ("least", "most", "message"),
    [
        (-1, 0, f"{FIELD}.min_ranks: must be in 1..4096, got -1"),
        (0, 4097, f"{FIELD}.max_ranks: must be in 1..4096, got 4097"),
        (3, 2, f"{FIELD}.max_ranks: must be at least min_ranks, 3, got 2"),
    ],
)
async def test_ranks_that_are_none_are_refused_by_their_field(
    bench: Any, least: int, most: int, message: str
) -> None:
    with pytest.raises(InvalidArgument) as caught:
        await bench.plan(ranks=RankRange(min_ranks=least, max_ranks=most))
    assert caught.value.message == message


@pytest.mark.parametrize(
    ("least", "most", "filled"), [(0, 0, (1, 1)), (2, 0, (2, 2)), (0, 4, (1, 4)), (2, 3, (2, 3))]
)
async def test_a_resolved_job_says_both_ends(
    bench: Any, least: int, most: int, filled: tuple[int, int]
) -> None:
    plan = await bench.plan(ranks=RankRange(min_ranks=least, max_ranks=most), **CUT)
    assert (plan.resolved_job.ranks.min_ranks, plan.resolved_job.ranks.max_ranks) == filled
    assert not (await bench.plan()).resolved_job.HasField("ranks"), "as yesterday"


async def test_ranks_that_no_step_has_work_for_are_refused_and_idle_ones_warned_of(bench: Any) -> None:
    four = await bench.plan(ranks=RankRange(min_ranks=4), **CUT)
    assert four.num_steps == 5
    assert not [text for text in four.warnings if "ranks" in text]
    eight = await bench.plan(ranks=RankRange(max_ranks=8), **CUT)
    assert [text for text in eight.warnings if "with 8 ranks 5 of 5 steps leave some of them idle" in text]
    with pytest.raises(FailedPrecondition) as caught:
        await bench.plan(ranks=RankRange(min_ranks=5), **CUT)
    assert caught.value.reason == "TOO_MANY_RANKS"
    assert "must be at most the 4 forward passes of the largest step, got 5" in caught.value.message


async def test_passes_of_an_open_size_are_cut_by_who_trains(bench: Any) -> None:
    """By default: a job of several ranks must not be refused for passes that are as large as fits."""
    plan = await bench.plan(ranks=RankRange(min_ranks=2))
    assert plan.resolved_job.hyperparameters.micro_batch_tokens == 0
    assert not [text for text in plan.warnings if "ranks" in text]


@pytest.mark.parametrize(
    ("least", "most", "trained", "message"),
    [
        (
            1,
            2,
            [],
            f"{FIELD}.min_ranks: must be at least 2 with sharding SHARDING_FSDP2, as one rank holds all of the "
            "model, got 1",
        ),
        (0, 1, [], f"{FIELD}.max_ranks: must be at least min_ranks, 2, got 1"),
        (
            2,
            2,
            ["lm_head"],
            "fine_tuning_job.lora.trained_modules: must be empty with sharding SHARDING_FSDP2, which "
            "divides no weights that an adapter puts in place of the model's, got ['lm_head']",
        ),
    ],
)
async def test_what_ranks_cannot_divide_is_refused_by_its_field(
    bench: Any, least: int, most: int, trained: list[str], message: str
) -> None:
    lora = LoraConfig(trained_modules=trained)
    ranks = RankRange(min_ranks=least, max_ranks=most)
    with pytest.raises(InvalidArgument) as caught:
        await bench.plan(sharding=SHARDING_FSDP2, ranks=ranks, lora=lora)
    assert caught.value.message == message
    if trained or least:
        await bench.plan(sharding=SHARDING_REPLICATED, ranks=ranks, lora=lora, **CUT)


async def test_moments_in_main_memory_are_not_divided(bench: Any) -> None:
    hyperparameters = Hyperparameters(optimiser_states=OPTIMISER_STATES_OFFLOADED)
    with pytest.raises(InvalidArgument) as caught:
        await bench.plan(sharding=SHARDING_FSDP2, full=FullConfig(), hyperparameters=hyperparameters)
    assert caught.value.message == (
        "fine_tuning_job.hyperparameters.optimiser_states: must be OPTIMISER_STATES_FLOAT32 with sharding "
        "SHARDING_FSDP2, which divides no moments of 8 bits and none in main memory, got OPTIMISER_STATES_OFFLOADED"
    )


async def test_what_is_quantised_is_not_divided(bench: Any) -> None:
    hyperparameters = Hyperparameters(optimiser_states=OPTIMISER_STATES_INT8)
    with pytest.raises(InvalidArgument) as caught:
        await bench.plan(
            sharding=SHARDING_FSDP2, base_precision=BASE_PRECISION_NF4, hyperparameters=hyperparameters
        )
    assert [one.field for one in caught.value.violations] == [
        "fine_tuning_job.base_precision",
        "fine_tuning_job.hyperparameters.optimiser_states",
    ]
    assert "got BASE_PRECISION_NF4" in caught.value.message


@pytest.mark.parametrize(("most", "filled"), [(0, (2, 2)), (8, (2, 8))])
async def test_a_model_is_divided_by_two_ranks_where_nothing_is_said(
    bench: Any, most: int, filled: tuple[int, int]
) -> None:
    plan = await bench.plan(sharding=SHARDING_FSDP2, ranks=RankRange(max_ranks=most), **CUT)
    job = plan.resolved_job
    assert (job.ranks.min_ranks, job.ranks.max_ranks) == filled
    alone = (await bench.plan(sharding=SHARDING_FSDP2, **CUT)).resolved_job
    assert (alone.ranks.min_ranks, alone.ranks.max_ranks) == (2, 2)
