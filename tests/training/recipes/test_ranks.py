"""Every method on several ranks: the steps of one rank within rounding, the same bits again, and any number goes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.training.recipes.crews import METHODS, Made, Run, on_ranks
from tests.training.recipes.crews import assert_close as assert_rounded
from transformers import PreTrainedModel

from luthier.errors import FailedPrecondition, Unavailable
from luthier.kernels.dequantise import is_quantised
from luthier.lm.packed import WEIGHT, PackedBatch
from luthier.lm.precision import Precision
from luthier.lm.quantise import quantise_linears
from luthier.training.recipes.batches import count_steps, iterate_steps
from luthier.training.recipes.collective import Collective, OneRank, dealt, share_of
from luthier.training.recipes.objectives import REFERENCE
from luthier.training.recipes.reference import score_reference

ModelMaker = Callable[..., PreTrainedModel]
RunMaker = Callable[..., Run]


@pytest.fixture
def make_run(tiny_llama: ModelMaker, token_rows: Callable[..., list[Any]]) -> RunMaker:
    def make(method: str, kind: str = "adapter", rollouts: Any = None, **changes: Any) -> Run:
        return Run(tiny_llama(), token_rows(40), method, kind, rollouts, **changes)

    return make


def crew(make: Callable[[], Run], num_ranks: int, folder: Path, **options: Any) -> list[Made]:
    return on_ranks(num_ranks, folder, lambda collective: make().made(collective, folder / "run", **options))


def assert_close(found: list[dict[str, float]], wanted: list[dict[str, float]]) -> None:
    assert len(found) == len(wanted) > 2
    for left, right in zip(found, wanted, strict=True):
        assert left.keys() == right.keys()
        for name, value in right.items():
            assert left[name] == pytest.approx(value, rel=2e-3, abs=1e-5), name


@pytest.mark.parametrize("kind", ["adapter", "all"])
@pytest.mark.parametrize("method", METHODS)
def test_two_ranks_make_the_steps_of_one_and_the_same_bits_again(
    make_run: RunMaker, method: str, kind: str, tmp_path: Path
) -> None:
    alone = make_run(method, kind).made(OneRank(), tmp_path / "alone")
    # What is drawn depends on rounding: both learn from the same answers.
    drawn = alone.rollouts
    first, second = (
        crew(lambda: make_run(method, kind, drawn), 2, tmp_path / name) for name in ("first", "second")
    )
    assert_close(first[0].steps, alone.steps)
    assert all(one.steps == first[0].steps for one in (*first, *second))
    assert first[0].digests == second[0].digests != {}
    assert sum(one.passes for one in first) == alone.passes
    assert min(one.passes for one in first) > alone.passes // 3, "they share the work"


@pytest.mark.parametrize("precision", ["INT8", "NF4"])
def test_two_ranks_beside_a_quantised_base_make_the_steps_of_one(
    tiny_llama: ModelMaker, token_rows: Callable[..., list[Any]], precision: Precision, tmp_path: Path
) -> None:
    """Each quantises the weights for itself, to the same codes."""

    def run() -> Run:
        model = tiny_llama(torch.bfloat16)
        quantise_linears(model, precision, "cpu")
        return Run(model, token_rows(40), "sft", "adapter")

    alone = run()
    assert is_quantised(alone.model.model.layers[0].mlp.up_proj.weight)
    wanted = alone.made(OneRank(), tmp_path / "alone")
    first, second = (crew(run, 2, tmp_path / name) for name in ("first", "second"))
    assert_rounded(first[0].steps, wanted.steps)
    assert all(one.steps == first[0].steps for one in (*first, *second))
    assert first[0].digests == second[0].digests != {}
    assert sum(one.passes for one in first) == wanted.passes


@pytest.mark.parametrize("method", ["sft", "kto", "grpo"])
def test_three_ranks_of_which_some_have_nothing_to_do_make_the_steps_of_one(
    make_run: RunMaker, method: str, tmp_path: Path
) -> None:
    changes = {"batch_tokens": 96} if method == "sft" else {}
    run = make_run(method, **changes)
    passes = [
        len(one.micro_batches) for one in iterate_steps(run.corpus.lengths("TRAIN"), run.settings.batches)
    ]
    assert min(passes) < 3
    alone = run.made(OneRank(), tmp_path / "alone")
    three = crew(lambda: make_run(method, "adapter", alone.rollouts, **changes), 3, tmp_path / "three")
    assert_close(three[0].steps, alone.steps)
    assert three[0].steps == three[1].steps == three[2].steps


@pytest.mark.parametrize("ways", [(2, 3), (3, 1), (1, 2)], ids=lambda ways: f"{ways[0]}-{ways[1]}")
def test_a_checkpoint_of_some_ranks_goes_on_on_others(
    make_run: RunMaker, ways: tuple[int, int], tmp_path: Path
) -> None:
    def run(num_ranks: int, folder: Path, **options: Any) -> Made:
        return crew(lambda: make_run("sft"), num_ranks, folder, **options)[0]

    whole = make_run("sft").made(OneRank(), tmp_path / "whole")
    before = run(ways[0], tmp_path / "before", end_step=3)
    after = run(ways[1], tmp_path / "after", begin=tmp_path / "before" / "run")
    assert_close([*before.steps, *after.steps], whole.steps)
    assert len(before.steps) == 3


def test_answers_are_drawn_on_both_ranks_as_one_draws_them(make_run: RunMaker, tmp_path: Path) -> None:
    """In the first step, before rounding has made other weights; later ones are all graded, and kept once."""
    alone = make_run("grpo").made(OneRank(), tmp_path / "alone")
    first, second = crew(lambda: make_run("grpo"), 2, tmp_path / "two")
    tokens = [[one.token_ids for one in made.rollouts[1]] for made in (alone, first)]
    assert tokens[0] == tokens[1]
    assert len(first.rollouts) == len(alone.rollouts) > 2
    assert second.rollouts == {}, "the first rank keeps for all"
    assert first.steps == second.steps


def test_a_stored_reference_is_the_same_whoever_scores_it(make_run: RunMaker, tmp_path: Path) -> None:
    def scored(collective: Collective) -> Any:
        run = make_run("dpo", "all")
        told: list[tuple[int, ...]] = []
        score_reference(run.engine(collective), run.corpus, 48, tell=lambda *far: told.append(far))
        return [run.corpus.stream(REFERENCE, split) for split in ("TRAIN", "VALIDATION")], told

    alone, every = scored(OneRank())
    assert every[0] == (0, 40)
    assert every == sorted(set(every))
    for found, told in on_ranks(2, tmp_path, scored):
        assert told[0] == every[0]
        assert told == sorted(set(told) & set(every)), "what all have scored, not this one"
        assert len(told) < len(every)
        for left, right in zip(found, alone, strict=True):
            assert np.array_equal(left, right)
            assert np.any(right)


def test_a_loss_that_is_not_finite_ends_all_ranks_with_the_rows_of_one(
    make_run: RunMaker, tmp_path: Path
) -> None:
    """Only the second rank meets the pass whose weights are broken."""
    run = make_run("sft", max_steps=1)
    (step,) = iterate_steps(run.corpus.lengths("TRAIN"), run.settings.batches)
    broken = step.micro_batches[1]

    def ended(collective: Collective) -> tuple[str, str]:
        spoilt = make_run("sft", max_steps=1)
        pack = spoilt.corpus.pack

        def packed(rows: Sequence[int], *split: Any) -> PackedBatch:
            batch = pack(rows, *split)
            if tuple(rows) == broken:
                assert collective.rank == 1
                batch.streams[WEIGHT].mul_(torch.nan)
            return batch

        vars(spoilt.corpus)["pack"] = packed
        try:
            spoilt.made(collective, tmp_path / "run")
        except FailedPrecondition as error:
            return error.reason or "", error.metadata["rows"]
        return "", ""

    found = on_ranks(2, tmp_path, ended)
    assert found[0] == found[1]
    assert found[0] == ("LOSS_NOT_FINITE", ",".join(map(str, broken)))


def test_ranks_whose_weights_differ_say_so_before_a_checkpoint(make_run: RunMaker, tmp_path: Path) -> None:
    def diverged(collective: Collective) -> tuple[str, str]:
        run = make_run("sft")
        engine = run.engine(collective)
        engine.require_same_weights()
        with torch.no_grad():
            parameter = next(iter(engine.weights.parameters.values()))
            parameter.view(-1)[3] += 1e-7 * collective.rank
        try:
            engine.require_same_weights()
        except Unavailable as error:
            return error.reason or "", error.metadata["ranks"]
        return "", ""

    assert on_ranks(3, tmp_path, diverged) == [("RANKS_DIVERGED", "1,2")] * 3


def test_a_collective_sums_gathers_and_asks_the_first(tmp_path: Path) -> None:
    def work(collective: Collective) -> Any:
        parts = [torch.full((2, 3), float(collective.rank + 1)), torch.tensor([0.5])]
        collective.sum_gradients(parts)
        asked: list[str] = []

        def ask() -> str:
            asked.append("")
            return "first"

        answer = collective.of_first(ask)
        return (
            [part.tolist() for part in parts],
            collective.sum_counts([1.0, float(collective.rank)]),
            collective.sum_counts([]),
            collective.gathered({"rank": collective.rank}),
            (answer, len(asked)),
        )

    found = on_ranks(3, tmp_path, work)
    every = [{"rank": 0}, {"rank": 1}, {"rank": 2}]
    for rank, one in enumerate(found):
        assert one == ([[[6.0] * 3] * 2, [1.5]], [3.0, 3.0], [], every, ("first", int(rank == 0)))


def test_a_rank_that_is_gone_is_named_as_lost(tmp_path: Path) -> None:
    def work(collective: Collective) -> Any:
        collective.gathered(None)
        if collective.rank:
            return "left"
        try:
            while True:
                collective.sum_counts([1.0])
        except Unavailable as error:
            return error.reason, dict(error.metadata)

    assert on_ranks(2, tmp_path, work) == [("RANK_LOST", {"rank": "0"}), "left"]


def test_batches_and_prompts_are_shared_out_whole() -> None:
    for num_ranks in (1, 2, 3, 5):
        ranks: list[Any] = [OneRank() for _ in range(num_ranks)]
        for rank, one in enumerate(ranks):
            one.rank, one.num_ranks = rank, num_ranks
        for count in (0, 1, 4, 11):
            batches = [dealt(range(count), one) for one in ranks]
            assert sorted(batch for part in batches for batch in part) == [
                (one, True) for one in range(count)
            ]
            assert max(map(len, batches)) - min(map(len, batches)) <= 1
            for one in ranks:
                one.passes_together = True
            together = [dealt(range(count), one) for one in ranks]
            assert len({len(part) for part in together}) == 1, "all make as many passes"
            assert sorted(place for part in together for place, counts in part if counts) == list(
                range(count)
            )
            assert {place for part in together for place, counts in part if not counts} <= {count - 1}
            for one in ranks:
                one.passes_together = False
            shares = [share_of(count, one) for one in ranks]
            assert [place for share in shares for place in share] == list(range(count))


def test_a_plan_counts_the_passes_of_its_steps(make_run: RunMaker) -> None:
    run = make_run("sft")
    passes = [
        len(one.micro_batches) for one in iterate_steps(run.corpus.lengths("TRAIN"), run.settings.batches)
    ]
    totals = count_steps(run.corpus.lengths("TRAIN"), run.settings.batches)
    assert totals.passes == {number: passes.count(number) for number in sorted(set(passes))}
