"""Files of a divided model: what one rank or another way of training goes on with, and what others load."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tests.training.recipes.crews import Made, Run, assert_close, divided, on_ranks
from transformers import PreTrainedModel

from luthier.training.recipes.collective import Collective, OneRank

RunMaker = Callable[..., Run]


@pytest.fixture
def make_run(tiny_llama: Callable[..., PreTrainedModel], token_rows: Callable[..., list[Any]]) -> RunMaker:
    def make(method: str, kind: str, dtype: torch.dtype = torch.bfloat16) -> Run:
        return Run(tiny_llama(dtype), token_rows(40), method, kind)

    return make


WAYS = ((2, True, 1, False), (1, False, 2, True), (2, True, 3, True))
"""Ranks before and after, and whether they divide the model."""


@pytest.mark.parametrize(
    ("kind", "dtype"), [("adapter", torch.bfloat16), ("all", torch.bfloat16), ("all", torch.float32)]
)
def test_a_checkpoint_goes_on_on_other_ranks_divided_or_not(
    make_run: RunMaker, kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    whole = make_run("sft", kind, dtype).made(OneRank(), tmp_path / "whole")

    def steps(num_ranks: int, is_divided: bool, name: str, **options: Any) -> list[dict[str, float]]:
        """Make some on so many ranks, and gather what they wrote, as a service does."""

        def made(collective: Collective) -> Made:
            folder = tmp_path / name / f"{collective.rank}"
            return make_run("sft", kind, dtype).made(collective, folder, **options)

        found = on_ranks(num_ranks, tmp_path / f"{name}-meeting", made, passes_together=is_divided)
        (tmp_path / f"{name}-stored").mkdir()
        for rank, one in enumerate(found):
            for path in one.digests:
                shutil.copy(tmp_path / name / f"{rank}" / path, tmp_path / f"{name}-stored")
        made_steps: list[dict[str, float]] = found[0].steps
        return made_steps

    # A model of float32 is its own masters, and is read from another file.
    ways = WAYS[:2] if dtype == torch.float32 else WAYS
    for number, (before, is_divided, after, goes_on_divided) in enumerate(ways):
        first = steps(before, is_divided, f"{number}-before", end_step=3)
        begin = tmp_path / f"{number}-before-stored"
        rest = steps(after, goes_on_divided, f"{number}-after", begin=begin)
        assert len(first) == 3
        assert_close([*first, *rest], whole.steps)


def test_all_weights_are_put_together_as_one_rank_writes_them(make_run: RunMaker, tmp_path: Path) -> None:
    alone = make_run("reward_model", "all").engine(OneRank())
    alone.weights.save(tmp_path / "alone")

    def work(collective: Collective) -> None:
        engine = make_run("reward_model", "all").engine(collective)
        engine.weights.save(tmp_path / f"rank-{collective.rank}", collective.rank)

    divided(2, tmp_path / "meeting", work)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "rank-0" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
    assert [path.name for path in (tmp_path / "rank-1").iterdir()] == ["masters-part-00001-00000.safetensors"]
    with safe_open(tmp_path / "rank-0" / "masters-part-00000-00000.safetensors", framework="pt") as file:
        held = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
        assert held["model.embed_tokens.weight"].get_dtype() == "F32"
        assert "score.weight" in held, "what all have whole is the first one's to write"
