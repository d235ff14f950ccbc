"""`linear_cross_entropy` in C++ as a torch custom op; the gradient is computed during the forward pass."""

from typing import Any

import torch
from torch import Tensor

from luthier.kernels import _core
from luthier.kernels.dispatch import current_isa


@torch.library.custom_op("luthier::linear_cross_entropy", mutates_args=(), device_types="cpu")
def linear_cross_entropy_cpu(
    hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, ignore_index: int, need_grad: bool
) -> tuple[Tensor, Tensor]:
    """Summed loss (float32 scalar) and its gradient to hidden (float32 [N, D], or [0, D] if not needed).

    The head is taken as frozen. Targets other than `ignore_index` must lie in [0, V).
    """
    hidden_ND = _rows_contiguous(hidden_ND)
    weight_VD = _rows_contiguous(weight_VD)
    target_N = target_N.contiguous()
    rows_M = (target_N != ignore_index).nonzero().squeeze(1)
    loss_M = torch.empty(rows_M.numel(), dtype=torch.float32)
    grad_ND = torch.zeros(hidden_ND.shape if need_grad else (0, hidden_ND.shape[1]), dtype=torch.float32)
    _core.linear_cross_entropy(
        hidden=hidden_ND.data_ptr(),
        weight=weight_VD.data_ptr(),
        target=target_N.data_ptr(),
        rows=rows_M.data_ptr(),
        loss=loss_M.data_ptr(),
        grad_hidden=grad_ND.data_ptr() if need_grad else 0,
        num_rows=rows_M.numel(),
        dim=weight_VD.shape[1],
        vocab=weight_VD.shape[0],
        hidden_stride=hidden_ND.stride(0),
        weight_stride=weight_VD.stride(0),
        bfloat16=hidden_ND.dtype == torch.bfloat16,
        isa=current_isa(),
        num_threads=torch.get_num_threads(),
    )
    # A float64 sum in one thread: its order, and so its bits, must not depend on the number of threads.
    return torch.tensor(sum(loss_M.tolist()), dtype=torch.float32), grad_ND


def _rows_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 and x.stride(0) >= 0 else x.contiguous()


@linear_cross_entropy_cpu.register_fake
def _(
    hidden_ND: Tensor, _weight_VD: Tensor, _target_N: Tensor, _ignore_index: int, need_grad: bool
) -> tuple[Tensor, Tensor]:
    shape = hidden_ND.shape if need_grad else (0, hidden_ND.shape[1])
    return hidden_ND.new_empty((), dtype=torch.float32), hidden_ND.new_empty(shape, dtype=torch.float32)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    if inputs[1].requires_grad:
        raise ValueError("linear_cross_entropy_cpu needs a frozen head, got weight.requires_grad=True")
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])
    ctx.dtype = inputs[0].dtype


def _backward(ctx: Any, grad_loss: Tensor, _grad_of_grad: Tensor) -> tuple[Tensor | None, ...]:
    (grad_ND,) = ctx.saved_tensors
    return (grad_ND * grad_loss).to(ctx.dtype), None, None, None, None


linear_cross_entropy_cpu.register_autograd(_backward, setup_context=_keep)
