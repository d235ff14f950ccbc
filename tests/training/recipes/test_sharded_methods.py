"""Every method of a model that is divided among ranks: the steps of one rank, and the same bits again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.training.recipes.crews import METHODS, Made, Run, assert_close, divided
from tests.training.recipes.test_sharding import make_run

from luthier.training.recipes.batches import iterate_steps
from luthier.training.recipes.collective import Collective, OneRank

__all__ = ["make_run"]
RunMaker = Callable[..., Run]


@pytest.mark.parametrize("kind", ["adapter", "all"])
def test_every_method_makes_the_steps_of_one_rank_and_the_same_bits_again(
    make_run: RunMaker, kind: str, tmp_path: Path
) -> None:
    short = {"max_steps": 3}
    alone = {method: make_run(method, kind, **short).made(OneRank(), tmp_path / method) for method in METHODS}

    def twice(collective: Collective) -> dict[str, list[Made]]:
        def made(method: str, name: str) -> Made:
            folder = tmp_path / name / f"{method}-{collective.rank}"
            return make_run(method, kind, alone[method].rollouts, **short).made(collective, folder)

        return {method: [made(method, name) for name in ("first", "second")] for method in METHODS}

    ranks = divided(2, tmp_path / "ranks", twice)
    for method in METHODS:
        (first, again), (other, _) = (rank[method] for rank in ranks)
        assert_close(first.steps, alone[method].steps)
        assert first.steps == again.steps == other.steps, method
        assert first.digests == again.digests != {}, method
        assert first.passes == other.passes, "a rank without one makes one that counts for nothing"
        assert first.passes + other.passes - alone[method].passes in range(4), method
        names = set(first.digests)
        if kind == "adapter":
            assert names == set(alone[method].digests), "an adapter's checkpoint does not tell who made it"
            assert other.digests == {}
        else:
            assert {"model.safetensors", "config.json", "masters-part-00000-00000.safetensors"} < names
            assert set(other.digests) == {
                "masters-part-00001-00000.safetensors",
                "optimizer-part-00001-00000.safetensors",
            }


@pytest.mark.parametrize("method", ["sft", "kto"])
def test_three_ranks_of_which_some_have_nothing_to_do_make_the_steps_of_one(
    make_run: RunMaker, method: str, tmp_path: Path
) -> None:
    """Without passes that count for nothing they would wait for one another for ever."""
    changes = {"batch_tokens": 96} if method == "sft" else {}
    run = make_run(method, **changes)
    passes = [
        len(one.micro_batches) for one in iterate_steps(run.corpus.lengths("TRAIN"), run.settings.batches)
    ]
    assert min(passes) < 3
    alone = run.made(OneRank(), tmp_path / "alone")
    three = divided(
        3,
        tmp_path / "three",
        lambda collective: make_run(method, **changes).made(collective, tmp_path / "run"),
    )
    assert_close(three[0].steps, alone.steps)
    assert three[0].steps == three[1].steps == three[2].steps


@pytest.mark.parametrize("kind", ["adapter", "all"])
def test_answers_are_drawn_from_divided_weights_as_one_rank_draws_them(
    make_run: RunMaker, kind: str, tmp_path: Path
) -> None:
    """In the first step, before rounding has made other weights; each draws to prompts of its own."""

    def made(collective: Collective) -> Made:
        run = make_run("grpo", kind, dtype=torch.float32)
        return run.made(collective, tmp_path / f"run-{collective.rank}")

    alone = made(OneRank())
    first, second = divided(2, tmp_path / "ranks", made)
    tokens = [[one.token_ids for one in run.rollouts[1]] for run in (alone, first)]
    assert tokens[0] == tokens[1]
    assert len(first.rollouts) == len(alone.rollouts) > 2
    assert second.rollouts == {}, "the first rank keeps for all"
    assert first.steps == second.steps
