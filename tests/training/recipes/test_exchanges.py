"""Exchanges in pieces: none is larger than one may be, whatever the tensor, and sums and parts are what they were."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.training.recipes.crews import CPU, Made, Run, divided, on_ranks
from torch import Tensor
from transformers import PreTrainedModel

from luthier.training.executors.vigil import Bounds
from luthier.training.recipes import exchanges
from luthier.training.recipes.collective import Collective
from luthier.training.recipes.exchanges import buckets, gather_parts, sum_parts
from luthier.training.recipes.process_group import Replicas

SMALL = 64
"""Bytes of a piece, where a test has small tensors."""


class Sizes:
    """Notes how much each exchange moves."""

    def __init__(self) -> None:
        self.found: list[int] = []

    def enter(self, num_bytes: int) -> None:
        self.found.append(num_bytes)

    def leave(self) -> None:
        """Nothing is noted."""


def gradients() -> list[Tensor]:
    """Return small ones, large ones, and some that do not lie in one piece of memory."""
    counted = torch.arange(400.0)
    return [
        counted[:3].clone(),
        counted[:100].clone(),
        counted[:60].clone().view(5, 12),
        counted[:63].clone().view(7, 9).t(),
        counted.clone()[::5],
        counted[:90].clone().view(1, 2, 45).transpose(1, 2),
        counted[:1].clone().view(()),
    ]


def test_a_piece_takes_no_longer_than_ten_seconds_where_a_partition_is_found_in_time() -> None:
    bounds = Bounds()
    seconds = bounds.apart_seconds + exchanges.PIECE_BYTES / bounds.bytes_per_second
    assert seconds < 7.0, "looks, and the end of all ranks, come on top of it"


def test_large_gradients_are_cut_into_views_of_every_element(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchanges, "PIECE_BYTES", SMALL)
    given = gradients()
    found = list(buckets(given))
    assert max(sum(piece.nbytes for piece in one) for one in found) <= SMALL
    for one in found:
        for piece in one:
            piece.fill_(-1.0)
    assert all(bool((gradient == -1.0).all()) for gradient in given), "each is a view"
    assert sum(piece.numel() for one in found for piece in one) == sum(one.numel() for one in given)


@pytest.mark.parametrize("num_bytes", [SMALL, exchanges.PIECE_BYTES])
def test_sums_of_pieces_are_sums(num_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchanges, "PIECE_BYTES", num_bytes)

    def work(collective: Collective) -> Any:
        sizes = Sizes()
        given = [gradient * (collective.rank + 1) for gradient in gradients()]
        Replicas(CPU, sizes).sum_gradients(given)
        return [one.tolist() for one in given], sizes.found

    wanted = [(6 * one).tolist() for one in gradients()]
    for summed, sizes in on_ranks(3, tmp_path, work):
        assert summed == wanted
        assert max(sizes) <= num_bytes
        assert sum(sizes) == 4 * sum(one.numel() for one in gradients())
        assert (len(sizes) == 1) == (num_bytes > SMALL)


@pytest.mark.parametrize("num_elements", [0, 1, 5, 6, 47])
def test_parts_are_gathered_and_summed_piece_by_piece(
    num_elements: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three ranks 5 float32 elements each are a piece of 60 bytes."""
    monkeypatch.setattr(exchanges, "PIECE_BYTES", SMALL)

    def work(collective: Collective) -> Any:
        sizes = Sizes()
        ranks = Replicas(CPU, sizes)
        own = torch.arange(float(num_elements)) + 100 * ranks.rank
        whole = torch.full((3 * num_elements,), torch.nan)
        gather_parts(ranks, whole, own, dist.group.WORLD)
        gathered = whole.tolist()
        part = torch.full((num_elements,), torch.nan)
        sum_parts(ranks, part, whole * (ranks.rank + 1), dist.ReduceOp.SUM, dist.group.WORLD)
        return gathered, part.tolist(), sizes.found

    counted = torch.arange(float(num_elements))
    every = torch.cat([counted + 100 * rank for rank in range(3)]).tolist()
    for rank, (gathered, part, sizes) in enumerate(on_ranks(3, tmp_path, work)):
        assert gathered == every
        assert part == (6 * (counted + 100 * rank)).tolist()
        assert len(sizes) == 2 * -(-num_elements // 5)
        assert max(sizes, default=0) <= SMALL


def test_an_exchange_begins_when_a_gpu_has_computed_what_it_was_given(tmp_path: Path) -> None:
    """Else who watches counts a pass of many seconds as one that does not end."""

    def work(_: Collective) -> list[str]:
        told: list[str] = []

        class Meetings:
            def enter(self, num_bytes: int) -> None:
                told.append(f"enter {num_bytes}")

            def leave(self) -> None:
                told.append("leave")

        vars(torch.cuda)["synchronize"] = lambda device: told.append(f"await {device}")
        ranks = Replicas(torch.device("cuda", 0), Meetings())
        with ranks.exchange(3):
            told.append("exchange")
        return told

    (told,) = on_ranks(1, tmp_path, work)
    assert told == ["await cuda:0", "enter 3", "exchange", "await cuda:0", "leave"]


def test_pieces_change_no_bit_of_a_divided_model_on_two_ranks(
    tiny_llama: Callable[..., PreTrainedModel],
    token_rows: Callable[..., list[Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of an odd number of words one rank has a row more, which is put together from parts of unlike size too."""

    def made(name: str) -> list[tuple[Made, int]]:
        def work(collective: Collective) -> tuple[Made, int]:
            sizes = Sizes()
            vars(collective)["_meetings"] = sizes
            run = Run(tiny_llama(torch.bfloat16), token_rows(40), "sft", "all", max_steps=3)
            found = run.made(collective, tmp_path / name / str(collective.rank))
            return found, len(sizes.found)

        return divided(2, tmp_path / f"ranks-{name}", work)

    whole = made("whole")
    monkeypatch.setattr(exchanges, "PIECE_BYTES", 1000)
    cut = made("cut")
    for (first, exchanged), (second, in_pieces) in zip(whole, cut, strict=True):
        assert first.steps == second.steps
        assert first.digests == second.digests != {}
        assert in_pieces > 3 * exchanged
