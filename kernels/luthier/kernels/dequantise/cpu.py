"""`dequantise` in C++. Shape suffixes: N outputs, K inputs."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from luthier.kernels import _core
from luthier.kernels.operands import settings


class Codes(NamedTuple):
    """Codes of 8 bits, or with `levels` two of 4 in a byte, the first in the upper half; a scale for each block."""

    codes: Tensor
    levels: Tensor | None
    scales: Tensor
    block: int

    def place(self, row_length: int) -> tuple[int, int, int, int, int]:
        """Where C++ finds them: addresses of codes, levels (0: none) and scales; elements of a block and of a row."""
        levels = 0 if self.levels is None else self.levels.data_ptr()
        return self.codes.data_ptr(), levels, self.scales.data_ptr(), self.block, row_length


@torch.no_grad()
def dequantise_cpu(weight_NK: Tensor) -> Tensor:
    """The numbers [N, K] that a quantised weight stands for, in the type that it stands for."""
    out_NK = torch.empty(weight_NK.shape, dtype=weight_NK.dtype, device="cpu")
    found = codes_of(weight_NK)
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


def address_of(weight_NK: Tensor) -> int:
    """Where the codes of a quantised weight lie."""
    held: Any = weight_NK
    codes: Tensor = held.quantized_data if hasattr(held, "quantized_data") else held.qdata
    return codes.data_ptr()


@torch.no_grad()
def codes_of(weight_NK: Tensor) -> Codes:
    """The codes of a quantised weight, which stay where they are, and its scales as floats."""
    held: Any = weight_NK
    if not hasattr(held, "quantized_data"):
        return Codes(held.qdata.contiguous(), None, held.scale.flatten().float(), weight_NK.shape[1])
    # As torchao does it, in the type of the weight.
    blocks = held.quantized_scalers.view(-1, held.scaler_block_size)
    scales = (blocks / held.quantization_factor[:, None]).flatten().to(weight_NK.dtype) + held.scaler_mean
    return Codes(held.quantized_data, held.nf4.float(), scales.float(), held.block_size)
