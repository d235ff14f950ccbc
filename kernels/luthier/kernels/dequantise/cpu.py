"""`dequantise` in C++. Shape suffixes: N outputs, K inputs."""

import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from luthier.kernels import _core
from luthier.kernels.dequantise import is_quantised
from luthier.kernels.operands import settings

_LINE_BYTES = 64


class _Codes(NamedTuple):
    """Codes of 8 bits, or with `levels` two of 4 in a byte, the first in the upper half; a scale for each block."""

    codes: Tensor
    levels: Tensor | None
    scales: Tensor
    block: int


class _Room(threading.local):
    """Memory of a thread, as large as the largest product has needed."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def of(self, size_bytes: int) -> Tensor:
        """So many bytes, which whoever asks next is given too."""
        if self._bytes.numel() < size_bytes:
            # The two are never there at once.
            self._bytes = torch.empty(0, dtype=torch.uint8)
            self._bytes = torch.empty(size_bytes, dtype=torch.uint8)
        return self._bytes


_room = _Room()


@torch.no_grad()
def dense_for_product(weights: Sequence[Tensor]) -> list[Tensor]:
    """The weights of one product as they are multiplied with, for as long as this thread makes no other product.

    What is made of quantised ones stands in the same memory each time. Made anew for each product, it leaves holes
    between what layers keep for their gradient, into which the next one does not fit: 18 of 176 MiB of a run.
    """
    sizes = [
        -(-one.numel() * one.dtype.itemsize // _LINE_BYTES) * _LINE_BYTES if is_quantised(one) else 0
        for one in weights
    ]
    if not any(sizes):
        return list(weights)
    parts = torch.split(_room.of(sum(sizes))[: sum(sizes)], sizes)
    return [
        _made(one, part[: one.numel() * one.dtype.itemsize].view(one.dtype).view(one.shape)) if size else one
        for one, size, part in zip(weights, sizes, parts, strict=True)
    ]


@torch.no_grad()
def dequantise_cpu(weight_NK: Tensor) -> Tensor:
    """The numbers [N, K] that a quantised weight stands for, in the type that it stands for."""
    return _made(weight_NK, torch.empty(weight_NK.shape, dtype=weight_NK.dtype, device="cpu"))


def _made(weight_NK: Tensor, out_NK: Tensor) -> Tensor:
    found = _codes_of(weight_NK)
    problem = {
        "codes": found.codes.data_ptr(),
        "levels": 0 if found.levels is None else found.levels.data_ptr(),
        "scales": found.scales.data_ptr(),
        "out": out_NK.data_ptr(),
        "num_blocks": found.scales.numel(),
        "block": found.block,
        "bfloat16": out_NK.dtype == torch.bfloat16,
    }
    _core.dequantise(problem, **settings())
    return out_NK


def _codes_of(weight_NK: Tensor) -> _Codes:
    held: Any = weight_NK
    if not hasattr(held, "quantized_data"):
        return _Codes(held.qdata.contiguous(), None, held.scale.flatten().float(), weight_NK.shape[1])
    # As torchao does it, in the type of the weight.
    blocks = held.quantized_scalers.view(-1, held.scaler_block_size)
    scales = (blocks / held.quantization_factor[:, None]).flatten().to(weight_NK.dtype) + held.scaler_mean
    return _Codes(held.quantized_data, held.nf4.float(), scales.float(), held.block_size)
