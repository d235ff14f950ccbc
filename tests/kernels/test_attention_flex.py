"""Attention by FlexAttention, and what the layers of a pass share.

FlexAttention runs without its kernel here, and forward alone: torch 2.13 has no gradient of it on a processor. On a GPU
`test_attention_gpu.py` tests both.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from luthier.kernels.attention_varlen import flex
from luthier.kernels.attention_varlen.bounds import bounds_on, kept
from luthier.kernels.attention_varlen.reference import attention_varlen_reference

CPU = torch.device("cpu")


def heads(num_tokens: int, shape: tuple[int, int, int]) -> list[Tensor]:
    """Query, key and value of (query heads, key heads, head size)."""
    generator = torch.Generator().manual_seed(0)
    query_heads, key_heads, size = shape
    return [
        torch.randn(num_tokens, count, size, generator=generator)
        for count in (query_heads, key_heads, key_heads)
    ]


def test_kept_makes_once_for_all_layers_and_keeps_two() -> None:
    made: list[int] = []

    @kept
    def make(number: int) -> Tensor:
        made.append(number)
        return torch.tensor(number)

    with torch.inference_mode():
        first = make(1)
    assert not first.is_inference()
    assert make(1) is first
    make(2)
    assert make(1) is first
    make(3)
    assert make(2) is not first
    assert made == [1, 2, 3, 2]
    with FakeTensorMode():
        assert make(3) is not make(3)
    assert type(make(3)) is Tensor


def test_bounds_are_on_the_device_once_for_both_windows() -> None:
    bounds = (0, 5, 300, 437)
    masks = [flex.block_mask(bounds, window, CPU) for window in (0, 130, 0, 130)]
    assert masks[0] is masks[2]
    assert masks[1] is masks[3]
    assert bounds_on(bounds, CPU) is bounds_on(bounds, CPU)


@pytest.mark.parametrize(
    "bounds",
    [
        (0, 5),
        (0, 128),
        (0, 300),
        (0, 128, 256),
        (0, 1, 8, 137, 300, 1000),
        (0, 700, 1300),
    ],
)
@pytest.mark.parametrize("window", [0, 1, 130, 600])
def test_block_mask_is_what_torch_makes(bounds: tuple[int, ...], window: int) -> None:
    ours = flex.block_mask(bounds, window, CPU)
    T = bounds[-1]
    rows = torch.arange(T)
    sequence = torch.searchsorted(torch.tensor(bounds), rows, right=True)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = (sequence[query] == sequence[key]) & (key <= query)
        return seen & (query - key < window) if window else seen

    theirs = create_block_mask(sees, None, None, T, T, device="cpu")
    assert ours.seq_lengths == theirs.seq_lengths
    assert ours.BLOCK_SIZE == theirs.BLOCK_SIZE
    sides = ("kv", "q", "full_kv", "full_q")
    names = [f"{side}_{what}" for side in sides for what in ("num_blocks", "indices")]
    for name in names:
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    none = torch.tensor(0)
    assert torch.equal(ours.mask_mod(none, none, rows[:, None], rows), sees(none, none, rows[:, None], rows))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(
    ("bounds", "shape", "options"),
    [
        ([0, 7], (1, 1, 16), (0.25, 0.0, 0)),
        ([0, 0, 5, 300, 300, 437], (4, 2, 64), (0.125, 0.0, 0)),
        ([0, 70, 400], (6, 2, 80), (0.3, 0.0, 50)),
        ([0, 1, 2, 130], (3, 1, 24), (24**-0.5, 0.0, 1)),
        ([0, 300, 700], (4, 2, 32), (0.2, 3.0, 130)),
    ],
)
def test_flex_computes_what_the_reference_does(
    bounds: list[int],
    shape: tuple[int, int, int],
    options: tuple[float, float, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(flex, "_compiled", lambda: flex_attention)
    query, key, value = heads(bounds[-1], shape)
    want = attention_varlen_reference(query.double(), key.double(), value.double(), bounds, *options)
    got = flex.attend_flex(query, key, value, bounds, *options)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


def test_flex_is_compiled_once_for_all_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []

    def count(graph: Any, inputs: Any) -> Any:
        compiled.append(inputs)
        return graph.forward

    monkeypatch.setattr(
        flex,
        "_compiled",
        lambda: torch.compile(flex_attention, dynamic=True, fullgraph=True, backend=count),
    )
    for bounds, window, scale in (([0, 300], 0, 0.25), ([0, 40, 700], 7, 0.25), ([0, 513, 900], 600, 0.25)):
        query, key, value = heads(bounds[-1], (4, 2, 16))
        flex.attend_flex(query, key, value, bounds, scale, 0.0, window)
    assert len(compiled) == 1
    for softcap, scale in ((5.0, 0.25), (7.0, 0.4)):
        flex.attend_flex(query, key, value, bounds, scale, softcap, 0)
    assert len(compiled) == 2
