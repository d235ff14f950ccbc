"""`rope` in C++ as a torch custom op. Shape suffixes: T tokens, H heads, D head size, R turned elements."""

from typing import Any

import torch
from torch import Tensor

from luthier.kernels import _core
from luthier.kernels.direct import kernel_op
from luthier.kernels.operands import head_pointer, heads_of, settings


@kernel_op("luthier::rope")
def rope_op(x_THD: Tensor, cos_TR: Tensor, sin_TR: Tensor, transposed: bool) -> Tensor:
    """X turned by its token's angles; `transposed` applies the gradient's map instead."""
    x_THD, cos_TR, sin_TR = heads_of(x_THD), cos_TR.contiguous(), sin_TR.contiguous()
    out_THD = torch.empty(x_THD.shape, dtype=x_THD.dtype, device="cpu")
    problem = {
        "x": head_pointer(x_THD),
        "out": head_pointer(out_THD),
        "cos": cos_TR.data_ptr(),
        "sin": sin_TR.data_ptr(),
        "num_tokens": x_THD.shape[0],
        "num_heads": x_THD.shape[1],
        "head_dim": x_THD.shape[2],
        "rotary_dim": cos_TR.shape[1],
        "transposed": transposed,
        "bfloat16": x_THD.dtype == torch.bfloat16,
    }
    _core.rope(problem, **settings())
    return out_THD


@rope_op.register_fake
def _(x_THD: Tensor, _cos_TR: Tensor, _sin_TR: Tensor, _transposed: bool) -> Tensor:
    return x_THD.new_empty(x_THD.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001 - torch's signature
    ctx.save_for_backward(inputs[1], inputs[2])
    ctx.transposed = inputs[3]


def _backward(ctx: Any, grad_THD: Tensor) -> tuple[Tensor | None, ...]:
    cos_TR, sin_TR = ctx.saved_tensors
    return rope_op(grad_THD, cos_TR, sin_TR, not ctx.transposed), None, None, None


rope_op.register_autograd(_backward, _keep)
