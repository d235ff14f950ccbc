"""`rms_norm` in C++ as a torch custom op. Shape suffixes: M rows, D size of a row."""

from typing import Any

import torch
from torch import Tensor

from luthier.kernels import _core
from luthier.kernels.direct import kernel_op
from luthier.kernels.operands import row_pointer, rows_of, settings


def problem_of(
    x_MD: Tensor, weight_D: Tensor, out_MD: Tensor, inverse_M: Tensor, options: tuple[float, float]
) -> dict[str, Any]:
    """The C++ problem; `options` are epsilon and offset."""
    return {
        "x": x_MD.data_ptr(),
        "weight": weight_D.data_ptr(),
        "out": out_MD.data_ptr(),
        "inverse": inverse_M.data_ptr(),
        "num_rows": x_MD.shape[0],
        "dim": x_MD.shape[1],
        "x_stride": x_MD.stride(0),
        "out_stride": out_MD.stride(0),
        "epsilon": options[0],
        "offset": options[1],
        "bfloat16": x_MD.dtype == torch.bfloat16,
    }


@kernel_op("luthier::rms_norm")
def rms_norm_op(x_MD: Tensor, weight_D: Tensor, epsilon: float, offset: float) -> tuple[Tensor, Tensor]:
    """Output [M, D], and for backward float32 [M]: 1 / sqrt(mean(x^2) + epsilon). The weight is taken as frozen."""
    x_MD, weight_D = rows_of(x_MD), weight_D.contiguous()
    out_MD = torch.empty(x_MD.shape, dtype=x_MD.dtype, device="cpu")
    inverse_M = torch.empty(x_MD.shape[0], dtype=torch.float32, device="cpu")
    _core.rms_norm(problem_of(x_MD, weight_D, out_MD, inverse_M, (epsilon, offset)), **settings())
    return out_MD, inverse_M


@rms_norm_op.register_fake
def _(x_MD: Tensor, _weight_D: Tensor, _epsilon: float, _offset: float) -> tuple[Tensor, Tensor]:
    return x_MD.new_empty(x_MD.shape), x_MD.new_empty(x_MD.shape[0], dtype=torch.float32)


@kernel_op("luthier::rms_norm_backward")
def rms_norm_backward_op(
    grad_MD: Tensor, x_MD: Tensor, weight_D: Tensor, inverse_M: Tensor, epsilon: float, offset: float
) -> Tensor:
    """The gradient of x."""
    grad_MD, x_MD, weight_D = rows_of(grad_MD), rows_of(x_MD), weight_D.contiguous()
    dx_MD = torch.empty(x_MD.shape, dtype=x_MD.dtype, device="cpu")
    problem = problem_of(x_MD, weight_D, dx_MD, inverse_M, (epsilon, offset))
    _core.rms_norm_gradient(problem, grad_out=row_pointer(grad_MD), **settings())
    return dx_MD


@rms_norm_backward_op.register_fake
def _(
    _grad_MD: Tensor, x_MD: Tensor, _weight_D: Tensor, _inverse_M: Tensor, _epsilon: float, _offset: float
) -> Tensor:
    return x_MD.new_empty(x_MD.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x_MD, weight_D, *options = inputs
    if weight_D.requires_grad:
        raise ValueError("our kernels need a frozen weight, got weight.requires_grad=True")
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x_MD, weight_D, output[1])
    ctx.options = options


def _backward(ctx: Any, grad_MD: Tensor, _grad_inverse: Tensor) -> tuple[Tensor | None, ...]:
    return rms_norm_backward_op(grad_MD, *ctx.saved_tensors, *ctx.options), None, None, None


rms_norm_op.register_autograd(_backward, _keep)
