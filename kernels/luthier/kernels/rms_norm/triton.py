"""`rms_norm` in Triton. Shape suffixes: M rows, D size of a row."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from luthier.kernels.gpu import Launch, covering, enqueue
from luthier.kernels.operands import rows_of
from luthier.kernels.rms_norm.cpu import rms_norm_backward_op, rms_norm_op


@triton.jit
def forward_kernel(x, weight, out, inverse, x_stride, D, epsilon, offset, BLOCK_D: tl.constexpr):
    """One row: inverse = 1 / sqrt(mean(x^2) + epsilon), out = x * inverse * (weight + offset)."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    mask = columns < D
    values = tl.load(x + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
    factors = tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32) + offset
    root = 1.0 / tl.sqrt(tl.sum(values * values, axis=0) / D + epsilon)
    tl.store(inverse + row, root)
    tl.store(out + row * D + columns, (values * root * factors).to(out.dtype.element_ty), mask=mask)


@triton.jit
def backward_kernel(
    grad_out, x, weight, inverse, grad_x, grad_stride, x_stride, D, offset, BLOCK_D: tl.constexpr
):
    """One row: dx = inverse * (g - n * mean(g * n)) with g = dy * (weight + offset) and n = x * inverse."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    mask = columns < D
    root = tl.load(inverse + row)
    factors = tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32) + offset
    grads = tl.load(grad_out + row * grad_stride + columns, mask=mask, other=0.0).to(tl.float32) * factors
    normed = tl.load(x + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32) * root
    found = root * (grads - normed * (tl.sum(grads * normed, axis=0) / D))
    tl.store(grad_x + row * D + columns, found.to(grad_x.dtype.element_ty), mask=mask)


@functools.cache
def launch_of(dim: int) -> Launch:
    """A warp for each 512 elements of a row: 16 for each of its threads, loaded 8 at a time."""
    block = covering(dim)
    return Launch(tiles={"BLOCK_D": block}, num_warps=min(16, max(1, block // 512)), num_stages=1)


@rms_norm_op.on_gpu
def rms_norm_triton(x_MD: Tensor, weight_D: Tensor, epsilon: float, offset: float) -> tuple[Tensor, Tensor]:
    """Output [M, D], and for backward float32 [M]: 1 / sqrt(mean(x^2) + epsilon)."""
    x_MD, weight_D = rows_of(x_MD), weight_D.contiguous()
    out_MD = torch.empty(x_MD.shape, dtype=x_MD.dtype, device=x_MD.device)
    inverse_M = torch.empty(x_MD.shape[0], dtype=torch.float32, device=x_MD.device)
    if x_MD.shape[0]:
        M, D = x_MD.shape
        operands = x_MD, weight_D, out_MD, inverse_M, x_MD.stride(0), D, epsilon, offset
        enqueue(forward_kernel, (M,), operands, {}, launch_of(D))
    return out_MD, inverse_M


@rms_norm_backward_op.on_gpu
def rms_norm_backward_triton(
    grad_MD: Tensor,
    x_MD: Tensor,
    weight_D: Tensor,
    inverse_M: Tensor,
    _epsilon: float,
    offset: float,
) -> Tensor:
    """The gradient of x."""
    grad_MD, x_MD, weight_D = rows_of(grad_MD), rows_of(x_MD), weight_D.contiguous()
    dx_MD = torch.empty(x_MD.shape, dtype=x_MD.dtype, device=x_MD.device)
    if x_MD.shape[0]:
        M, D = x_MD.shape
        strides = grad_MD.stride(0), x_MD.stride(0)
        operands = grad_MD, x_MD, weight_D, inverse_M, dx_MD, *strides, D, offset
        enqueue(backward_kernel, (M,), operands, {}, launch_of(D))
    return dx_MD
