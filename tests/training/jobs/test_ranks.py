"""What a job may say of ranks, and what its plan says of them."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
from tests.training.conftest import lengths_of
from tests.training.jobs.rollouts import reinforcement
from tests.training.jobs.test_reinforcement import know, prompts

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
    PreferenceConfig,
    RankRange,
)
from luthier.v1.rendering_pb2 import RENDERING_KIND_PREFERENCE

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


async def test_more_ranks_than_a_step_has_rows_are_refused_before_anything_is_loaded(bench: Any) -> None:
    """20 rows of 10 tokens; passes are of an open size, as they are by default."""
    for rows, steers in (
        (20, Hyperparameters()),
        (4, Hyperparameters(batch_rows=4)),
        (4, Hyperparameters(batch_tokens=45)),
        (1, Hyperparameters(batch_tokens=10, micro_batch_tokens=10)),
    ):
        said = {"hyperparameters": steers}
        await bench.plan(ranks=RankRange(min_ranks=rows), **said)
        with pytest.raises(FailedPrecondition) as caught:
            await bench.plan(ranks=RankRange(min_ranks=rows + 1), **said)
        assert caught.value.reason == "TOO_MANY_RANKS"
        assert f"of the largest step, got {rows + 1}: lower it" in caught.value.message
        assert f"ranks.min_ranks must be at most the {rows} " in caught.value.message
    with pytest.raises(FailedPrecondition) as caught:
        await bench.create("many", ranks=RankRange(min_ranks=21))
    assert caught.value.message == (
        "ranks.min_ranks must be at most the 20 rows of the largest step, got 21: lower it, or make steps of more rows"
    )
    assert caught.value.metadata == {"min_ranks": "21", "rows": "20"}
    with pytest.raises(FailedPrecondition, match="at most the 4 rows of the largest step, got 5"):
        await bench.create(
            "some", ranks=RankRange(min_ranks=5), hyperparameters=Hyperparameters(batch_rows=4)
        )
    assert (await bench.create("enough", ranks=RankRange(min_ranks=20))).ranks.min_ranks == 20


async def test_a_job_is_refused_by_the_rows_that_its_steps_have_room_for(bench: Any) -> None:
    bench.renderings.views[bench.RENDERING].split_statistics[0].tokens.minimum = 10
    with pytest.raises(FailedPrecondition, match="at most the 4 rows of the largest step, got 5"):
        await bench.create(
            "many", ranks=RankRange(min_ranks=5), hyperparameters=Hyperparameters(batch_tokens=49)
        )


async def test_a_pass_of_an_open_size_has_the_longest_row_and_so_many_short_ones(bench: Any) -> None:
    """One row of 40 tokens and four of 10: two passes are the most, though there are five rows."""
    rendering = bench.renderings.views[bench.RENDERING]
    bench.know(rendering, (*lengths_of(1, 40), *lengths_of(4, 10, first=1)), ())
    await bench.plan(ranks=RankRange(min_ranks=2))
    with pytest.raises(FailedPrecondition) as caught:
        await bench.plan(ranks=RankRange(min_ranks=3))
    assert caught.value.message == (
        "ranks.min_ranks must be at most the 2 forward passes of the largest step, got 3: lower it, or make steps "
        "larger, as no pass is smaller than the longest row"
    )
    warned = await bench.plan(ranks=RankRange(max_ranks=3))
    assert (
        "with 3 ranks 1 of 1 steps leave some of them idle, as they have fewer forward passes; a larger batch makes "
        "more"
    ) in warned.warnings


async def test_ranks_of_reinforcement_that_divide_the_model_need_an_answer_each(bench: Any) -> None:
    """Who draws none holds a part of the weights, and two is the least."""
    know(bench, prompts(*[10] * 20))
    said = {
        "reinforcement": reinforcement(max_new_tokens=20, num_samples=4),
        "hyperparameters": Hyperparameters(batch_rows=1),
        "sharding": SHARDING_FSDP2,
    }
    for ranks in (RankRange(), RankRange(min_ranks=4)):
        await bench.plan(ranks=ranks, **said)
    with pytest.raises(FailedPrecondition, match="at most the 4 answers of the largest step, got 5"):
        await bench.plan(ranks=RankRange(min_ranks=5), **said)


@pytest.mark.parametrize(("rows", "most"), [(4, 4), (0, 16), (64, 20)])
async def test_ranks_of_reinforcement_share_the_prompts_of_a_step(bench: Any, rows: int, most: int) -> None:
    know(bench, prompts(*[10] * 20))
    said = {
        "reinforcement": reinforcement(max_new_tokens=20),
        "hyperparameters": Hyperparameters(batch_rows=rows) if rows else Hyperparameters(),
    }
    await bench.plan(ranks=RankRange(min_ranks=most), **said)
    for ask in (bench.plan, partial(bench.create, "many")):
        with pytest.raises(FailedPrecondition) as caught:
            await ask(ranks=RankRange(min_ranks=most + 1), **said)
        assert caught.value.reason == "TOO_MANY_RANKS"
        assert caught.value.message == (
            f"ranks.min_ranks must be at most the {most} prompts of the largest step, got {most + 1}: lower it, or "
            "make steps of more prompts"
        )


async def test_two_rows_of_a_pair_are_no_work_for_two_ranks(bench: Any) -> None:
    bench.add_rendering(kind=RENDERING_KIND_PREFERENCE)
    bench.renderings.views[bench.RENDERING].split_statistics[0].num_units = 10
    with pytest.raises(FailedPrecondition, match="at most the 10 pairs of the largest step, got 11"):
        await bench.create("many", ranks=RankRange(min_ranks=11), preference=PreferenceConfig())


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
