"""Eager reference of the LoRA linear ops, in plain torch: any float dtype and device, gradients by autograd.

Shape suffixes: M rows, K inputs, N outputs, R rank.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from luthier.kernels.dequantise.reference import frozen_linear

_ROUND_FACTORS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


def dropout_mask(
    shape: tuple[int, int], probability: float, key: Sequence[int], device: torch.device
) -> Tensor:
    """Which elements [M, K] are kept, bool: Philox4x32-10 (Salmon et al., 2011), four columns to a counter.

    `key` is that of `Dropout`: the element at (row, column) depends on seed, stream, the row's number and column
    alone, not on how rows are put together.
    """
    seed, stream = key[:2]
    numbers = [torch.arange(row0, row0 + last - first) for first, last, row0 in numbered(shape[0], key)]
    rows_M = torch.cat(numbers).to(device)[:, None]
    groups = torch.arange((shape[1] + 3) // 4, dtype=torch.int64, device=device)[None]
    zeros = torch.zeros_like(rows_M + groups)
    counter = [zeros + groups, zeros + (rows_M & _MASK), zeros + (rows_M >> 32), zeros + (stream & _MASK)]
    keys = [seed & _MASK, seed >> 32 & _MASK]
    for _ in range(10):
        (low0, high0), (low1, high1) = map(_multiply, counter[::2], _ROUND_FACTORS)
        counter = [high1 ^ counter[1] ^ keys[0], low1, high0 ^ counter[3] ^ keys[1], low0]
        keys = [(one + step) & _MASK for one, step in zip(keys, _KEY_STEPS, strict=True)]
    words = torch.stack(counter, dim=-1).flatten(1)[:, : shape[1]]
    return words >= min(int(probability * 2**32), _MASK)


def numbered(num_rows: int, key: Sequence[int]) -> list[tuple[int, int, int]]:
    """The rows of a batch as (first, end, number of the first), whose numbers follow one another."""
    starts = [(0, key[2]), *zip(key[3::2], key[4::2], strict=True)]
    ends = [*(min(place, num_rows) for place, _ in starts[1:]), num_rows]
    return [(place, end, row0) for (place, row0), end in zip(starts, ends, strict=True) if place <= end]


def _multiply(word: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """The low and the high 32 bits of a product of 32-bit numbers, without overflow of int64."""
    low = word * (factor & 0xFFFF)
    high = word * (factor >> 16) + (low >> 16)
    return ((high & 0xFFFF) << 16) | (low & 0xFFFF), high >> 16


def dropped(x_MK: Tensor, probability: float, key: Sequence[int]) -> Tensor:
    """X with the elements that `dropout_mask` does not keep zeroed and the others divided by 1 - probability."""
    if probability == 0:
        return x_MK
    kept_MK = dropout_mask((x_MK.shape[0], x_MK.shape[1]), probability, key, x_MK.device)
    return torch.where(kept_MK, x_MK / (1 - probability), torch.zeros_like(x_MK))


def lora_linear_reference(
    x_MK: Tensor,
    dropped_MK: Tensor,
    weight_NK: Tensor,
    bias_N: Tensor | None,
    lora: tuple[Tensor, Tensor, float],
) -> Tensor:
    """X W^T + bias + scale (dropped A^T) B^T, with A and B rounded to the type of x; `lora` is (A, B, scale)."""
    a_RK, b_NR, scale = lora
    low_MR = nn.functional.linear(dropped_MK, a_RK.to(x_MK.dtype))
    return frozen_linear(x_MK, weight_NK, bias_N) + scale * nn.functional.linear(low_MR, b_NR.to(x_MK.dtype))
