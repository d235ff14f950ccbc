"""Gated activations in Triton. Shape suffixes: M rows, F size of a row."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from luthier.kernels.gated_activation.cpu import gated_activation_backward_op, gated_activation_op
from luthier.kernels.gpu import Launch, enqueue
from luthier.kernels.operands import rows_of

LAUNCH = Launch(tiles={"BLOCK": 1024}, num_warps=4, num_stages=1)


@triton.jit
def _activation(gate, GELU: tl.constexpr):
    """The activation of a gate and its derivative, float32."""
    if GELU:
        # (1 + tanh(z)) / 2 is the sigmoid of 2z, and its complement that of -2z: nothing cancels.
        inner = 2.0 * 0.7978845608028654 * gate * (1.0 + 0.044715 * gate * gate)
        slope = 2.0 * 0.7978845608028654 * (1.0 + 3.0 * 0.044715 * gate * gate)
        sigmoid = tl.sigmoid(inner)
        value = gate * sigmoid
        derivative = sigmoid + gate * sigmoid * tl.sigmoid(-inner) * slope
    else:
        sigmoid = tl.sigmoid(gate)
        value = gate * sigmoid
        derivative = sigmoid * (1.0 + gate * (1.0 - sigmoid))
    return value, derivative


@triton.jit
def forward_kernel(gate, up, out, gate_stride, up_stride, F, GELU: tl.constexpr, BLOCK: tl.constexpr):
    """activation(gate) * up for a piece of one row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < F
    gates = tl.load(gate + row * gate_stride + columns, mask=mask, other=0.0).to(tl.float32)
    ups = tl.load(up + row * up_stride + columns, mask=mask, other=0.0).to(tl.float32)
    value, _ = _activation(gates, GELU)
    tl.store(out + row * F + columns, (value * ups).to(out.dtype.element_ty), mask=mask)


@triton.jit
def backward_kernel(
    grad, gate, up, grad_gate, grad_up, grad_stride, gate_stride, up_stride, F,
    GELU: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of gate and up for a piece of one row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < F
    grads = tl.load(grad + row * grad_stride + columns, mask=mask, other=0.0).to(tl.float32)
    gates = tl.load(gate + row * gate_stride + columns, mask=mask, other=0.0).to(tl.float32)
    ups = tl.load(up + row * up_stride + columns, mask=mask, other=0.0).to(tl.float32)
    value, derivative = _activation(gates, GELU)
    place = row * F + columns
    tl.store(grad_gate + place, (grads * ups * derivative).to(grad_gate.dtype.element_ty), mask=mask)
    tl.store(grad_up + place, (grads * value).to(grad_up.dtype.element_ty), mask=mask)


def _grid(shape: tuple[int, ...]) -> tuple[int, int]:
    return shape[0], triton.cdiv(shape[1], LAUNCH.tiles["BLOCK"])


@gated_activation_op.on_gpu
def gated_activation_triton(gate_MF: Tensor, up_MF: Tensor, gelu: bool) -> Tensor:
    """silu(gate) * up, or gelu (by tanh) instead of silu."""
    gate_MF, up_MF = rows_of(gate_MF), rows_of(up_MF)
    out_MF = torch.empty(gate_MF.shape, dtype=gate_MF.dtype, device=gate_MF.device)
    if out_MF.numel():
        operands = gate_MF, up_MF, out_MF, gate_MF.stride(0), up_MF.stride(0), gate_MF.shape[1]
        enqueue(forward_kernel, _grid(gate_MF.shape), operands, {"GELU": gelu}, LAUNCH)
    return out_MF


@gated_activation_backward_op.on_gpu
def gated_activation_backward_triton(
    grad_MF: Tensor, gate_MF: Tensor, up_MF: Tensor, gelu: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up."""
    grad_MF, gate_MF, up_MF = rows_of(grad_MF), rows_of(gate_MF), rows_of(up_MF)
    grad_gate, grad_up = (
        torch.empty(gate_MF.shape, dtype=gate_MF.dtype, device=gate_MF.device) for _ in range(2)
    )
    if grad_gate.numel():
        strides = grad_MF.stride(0), gate_MF.stride(0), up_MF.stride(0)
        operands = grad_MF, gate_MF, up_MF, grad_gate, grad_up, *strides, gate_MF.shape[1]
        enqueue(backward_kernel, _grid(gate_MF.shape), operands, {"GELU": gelu}, LAUNCH)
    return grad_gate, grad_up
