"""`adamw_8bit` in C++."""

import functools
import math
from typing import Any

import torch
from torch import Tensor

from luthier.kernels import _core
from luthier.kernels.adamw_8bit import BLOCK, Rates
from luthier.kernels.operands import settings


@torch.no_grad()
def adamw_8bit_cpu(weight: Tensor, grad: Tensor, moments: tuple[Tensor, Tensor], rates: Rates) -> None:
    """Change a weight and its moments in place."""
    mean, square = (_moment(moment) for moment in moments)
    problem = {
        "weight": weight.data_ptr(),
        "grad": grad.data_ptr(),
        "mean": mean,
        "square": square,
        "num_blocks": weight.numel() // BLOCK,
        "block": BLOCK,
        "learning_rate": rates.learning_rate,
        "decay": rates.weight_decay,
        "beta1": rates.betas[0],
        "beta2": rates.betas[1],
        "epsilon": rates.epsilon,
        "correction1": 1 - rates.betas[0] ** rates.number,
        "correction2": math.sqrt(1 - rates.betas[1] ** rates.number),
    }
    _core.adamw_8bit(problem, **settings())


def _moment(moment: Tensor) -> dict[str, int]:
    held: Any = moment
    values, nearest = _values(held.signed)
    return {
        "codes": held.codes.data_ptr(),
        "scales": held.scale.data_ptr(),
        "values": values.data_ptr(),
        "nearest": nearest.data_ptr(),
    }


@functools.cache
def _values(has_sign: bool) -> tuple[Tensor, Tensor]:
    """Return the values [256] of codes, and by the upper half of a float's bits, uint8 [65536], where to look."""
    from torchao.optim.subclass_8bit import get_qmap_signed, get_qmap_unsigned

    values = torch.tensor(get_qmap_signed() if has_sign else get_qmap_unsigned(), dtype=torch.float32)
    halves = torch.arange(1 << 16, dtype=torch.int64)
    # Of those that begin with the same bits the least: of negative ones that with all others set.
    bits = halves << 16 | torch.where(halves >= 1 << 15, 0xFFFF, 0)
    least = bits.to(torch.int32).view(torch.float32).nan_to_num(nan=0.0)
    codes = torch.searchsorted(values, least, right=True) - 1
    return values, codes.clamp(min=0).to(torch.uint8)
