"""`linear` in C++ as torch custom ops. Shape suffixes: M rows, K inputs, N outputs."""

from typing import Any

import torch
from torch import Tensor

from luthier.kernels.direct import kernel_op
from luthier.kernels.products import product


@kernel_op("luthier::linear")
def linear_op(x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor) -> Tensor:
    """Output [M, N]; a bias of no elements is none."""
    out_MN = torch.empty(x_MK.shape[0], weight_NK.shape[0], dtype=x_MK.dtype, device="cpu")
    return product([(x_MK, weight_NK, True)], out_MN, bias_N.contiguous() if bias_N.numel() else None)


@linear_op.register_fake
def _(x_MK: Tensor, weight_NK: Tensor, _bias_N: Tensor) -> Tensor:
    return x_MK.new_empty(x_MK.shape[0], weight_NK.shape[0])


@kernel_op("luthier::wide_linear")
def wide_linear_op(x_MK: Tensor, weight_NK: Tensor) -> Tensor:
    """Output [M, N] in float32."""
    out_MN = torch.empty(x_MK.shape[0], weight_NK.shape[0], dtype=torch.float32, device="cpu")
    return product([(x_MK, weight_NK, True)], out_MN)


@wide_linear_op.register_fake
def _(x_MK: Tensor, weight_NK: Tensor) -> Tensor:
    return x_MK.new_empty(x_MK.shape[0], weight_NK.shape[0], dtype=torch.float32)


def project(x_MK: Tensor, weight_NK: Tensor) -> Tensor:
    """X weight^T [M, N] in float32, differentiable in both."""
    is_narrow = x_MK.dtype == torch.bfloat16
    found: Tensor = (
        wide_linear_op(x_MK, weight_NK) if is_narrow else linear_op(x_MK, weight_NK, x_MK.new_empty(0))
    )
    return found


@kernel_op("luthier::linear_backward")
def linear_backward_op(grad_MN: Tensor, x_MK: Tensor, weight_NK: Tensor, needs: list[bool]) -> list[Tensor]:
    """Gradients of x [M, K], weight [N, K] and bias [N], of no elements where `needs` says no."""
    found = [x_MK.new_empty(0) for _ in needs]
    if needs[0]:
        found[0] = product([(grad_MN, weight_NK, False)], _empty(x_MK, *x_MK.shape))
    if needs[1]:
        found[1] = product([(grad_MN.T.contiguous(), x_MK, False)], _empty(x_MK, *weight_NK.shape))
    if needs[2]:
        found[2] = grad_MN.sum(dim=0, dtype=torch.float32).to(x_MK.dtype)
    return found


def _empty(x_MK: Tensor, *shape: int) -> Tensor:
    return torch.empty(*shape, dtype=x_MK.dtype, device="cpu")


@linear_backward_op.register_fake
def _(grad_MN: Tensor, x_MK: Tensor, weight_NK: Tensor, needs: list[bool]) -> list[Tensor]:
    shapes = (x_MK.shape, weight_NK.shape, grad_MN.shape[1:])
    return [x_MK.new_empty(shape if need else (0,)) for shape, need in zip(shapes, needs, strict=True)]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001 - torch gives it
    x_MK, weight_NK, bias_N = inputs
    ctx.save_for_backward(x_MK, weight_NK)
    ctx.bias_needs = bias_N.requires_grad and bias_N.numel() > 0


def _backward(ctx: Any, grad_MN: Tensor) -> tuple[Tensor | None, ...]:
    x_MK, weight_NK = ctx.saved_tensors
    needs = [*ctx.needs_input_grad[:2], ctx.bias_needs]
    found = linear_backward_op(grad_MN, x_MK, weight_NK, needs)
    return tuple(grad if need else None for grad, need in zip(found, needs, strict=True))


def _keep_wide(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001 - torch gives it
    ctx.save_for_backward(*inputs)


def _wide_backward(ctx: Any, grad_MN: Tensor) -> tuple[Tensor | None, ...]:
    x_MK, weight_NK = ctx.saved_tensors
    needs = [*ctx.needs_input_grad[:2], False]
    found = linear_backward_op(grad_MN.to(x_MK.dtype), x_MK, weight_NK, needs)
    return tuple(grad if need else None for grad, need in zip(found, needs[:2], strict=False))


linear_op.register_autograd(_backward, _keep)
wide_linear_op.register_autograd(_wide_backward, _keep_wide)
