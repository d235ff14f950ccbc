"""Eager reference of `dequantise`: what torchao itself makes of its tensors; and a product with such a weight.

Shape suffixes: M rows, N outputs, K inputs.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from luthier.kernels.dequantise import dense, is_quantised


@torch.no_grad()
def dequantise_reference(weight_NK: Tensor) -> Tensor:
    """The numbers [N, K] that a quantised weight stands for."""
    held: Any = weight_NK
    found: Tensor = held.get_original_weight() if hasattr(held, "get_original_weight") else held.dequantize()
    return found


def frozen_linear(x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    """X weight^T + bias; of a quantised weight nothing is kept for the gradient but the weight itself."""
    if not is_quantised(weight_NK):
        return nn.functional.linear(x_MK, weight_NK, bias_N)
    found: Tensor = _Frozen.apply(x_MK, _Held(weight_NK), bias_N)  # type: ignore[no-untyped-call]
    return found


class _Held:
    """A weight that autograd does not see: it is frozen, and kept by the model."""

    def __init__(self, weight_NK: Tensor) -> None:
        self.weight_NK = weight_NK


class _Frozen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_MK: Tensor, held: _Held, bias_N: Tensor | None) -> Tensor:
        ctx.held = held
        return nn.functional.linear(x_MK, dense(held.weight_NK), bias_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        grad_x = grad @ dense(ctx.held.weight_NK) if ctx.needs_input_grad[0] else None
        grad_bias = grad.flatten(0, -2).sum(dim=0) if ctx.needs_input_grad[2] else None
        return grad_x, None, grad_bias
