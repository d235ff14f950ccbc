"""Gated activations in C++ as a torch custom op. Shape suffixes: M rows, F size of a row."""

from typing import Any

import torch
from torch import Tensor

from luthier.kernels import _core
from luthier.kernels.direct import kernel_op
from luthier.kernels.operands import rows_of, settings


def problem_of(gate_MF: Tensor, up_MF: Tensor, gelu: bool) -> dict[str, Any]:
    """The C++ problem without its outputs."""
    return {
        "gate": gate_MF.data_ptr(),
        "up": up_MF.data_ptr(),
        "grad_out": 0,
        "out": 0,
        "grad_gate": 0,
        "grad_up": 0,
        "num_rows": gate_MF.shape[0],
        "dim": gate_MF.shape[1],
        "gate_stride": gate_MF.stride(0),
        "up_stride": up_MF.stride(0),
        "grad_stride": 0,
        "gelu": gelu,
        "bfloat16": gate_MF.dtype == torch.bfloat16,
    }


@kernel_op("luthier::gated_activation")
def gated_activation_op(gate_MF: Tensor, up_MF: Tensor, gelu: bool) -> Tensor:
    """silu(gate) * up, or gelu (by tanh) instead of silu."""
    gate_MF, up_MF = rows_of(gate_MF), rows_of(up_MF)
    out_MF = torch.empty(gate_MF.shape, dtype=gate_MF.dtype, device="cpu")
    _core.gated(problem_of(gate_MF, up_MF, gelu) | {"out": out_MF.data_ptr()}, **settings())
    return out_MF


@gated_activation_op.register_fake
def _(gate_MF: Tensor, _up_MF: Tensor, _gelu: bool) -> Tensor:
    return gate_MF.new_empty(gate_MF.shape)


@kernel_op("luthier::gated_activation_backward")
def gated_activation_backward_op(
    grad_MF: Tensor, gate_MF: Tensor, up_MF: Tensor, gelu: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up."""
    grad_MF, gate_MF, up_MF = rows_of(grad_MF), rows_of(gate_MF), rows_of(up_MF)
    grad_gate, grad_up = (torch.empty(gate_MF.shape, dtype=gate_MF.dtype, device="cpu") for _ in range(2))
    problem = problem_of(gate_MF, up_MF, gelu) | {
        "grad_out": grad_MF.data_ptr(),
        "grad_stride": grad_MF.stride(0),
        "grad_gate": grad_gate.data_ptr(),
        "grad_up": grad_up.data_ptr(),
    }
    _core.gated(problem, **settings())
    return grad_gate, grad_up


@gated_activation_backward_op.register_fake
def _(_grad_MF: Tensor, gate_MF: Tensor, up_MF: Tensor, _gelu: bool) -> tuple[Tensor, Tensor]:
    return gate_MF.new_empty(gate_MF.shape), up_MF.new_empty(up_MF.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001 - torch's signature
    ctx.save_for_backward(inputs[0], inputs[1])
    ctx.gelu = inputs[2]


def _backward(ctx: Any, grad_MF: Tensor) -> tuple[Tensor | None, ...]:
    gate_MF, up_MF = ctx.saved_tensors
    grads = gated_activation_backward_op(grad_MF, gate_MF, up_MF, ctx.gelu)
    return (*grads, None)


gated_activation_op.register_autograd(_backward, _keep)
