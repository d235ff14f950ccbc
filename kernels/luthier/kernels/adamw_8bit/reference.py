"""Eager reference of `adamw_8bit`: torchao's own update, of some weights at a time, as it widens codes to 64 bits."""

from typing import Any

import torch
from torch import Tensor

from luthier.kernels.adamw_8bit import BLOCK, Rates

_PIECE_BLOCKS = 1024


@torch.no_grad()
def adamw_8bit_reference(weight: Tensor, grad: Tensor, moments: tuple[Tensor, Tensor], rates: Rates) -> None:
    """Change a weight and its moments in place."""
    from torchao.optim.adam import single_param_adam

    means, squares = (_pieces(moment) for moment in moments)
    weights, grads = (torch.split(one.detach().view(-1), _PIECE_BLOCKS * BLOCK) for one in (weight, grad))
    for pieces in zip(weights, grads, means, squares, strict=True):
        one, gradient, mean, square = pieces
        single_param_adam(
            one,
            gradient,
            torch.tensor(float(rates.number)),
            mean,
            square,
            None,
            torch.tensor(rates.learning_rate),
            *rates.betas,
            rates.weight_decay,
            rates.epsilon,
            IS_ADAMW=True,
            BF16_STOCHASTIC_ROUND=False,
        )


def _pieces(moment: Tensor) -> list[Tensor]:
    from torchao.optim.subclass_8bit import OptimState8bit

    held: Any = moment
    codes = torch.split(held.codes.view(-1), _PIECE_BLOCKS * BLOCK)
    scales = torch.split(held.scale, _PIECE_BLOCKS)
    return [
        OptimState8bit(code, scale, held.qmap, held.signed, dtype=moment.dtype)
        for code, scale in zip(codes, scales, strict=True)
    ]
