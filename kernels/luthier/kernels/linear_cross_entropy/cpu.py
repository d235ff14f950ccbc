"""`linear_cross_entropy` in C++ as a torch custom op; the gradient is computed during the forward pass.

Shape suffixes: N rows, M counted rows, D hidden size, V vocabulary.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from luthier.kernels import _core
from luthier.kernels.direct import kernel_op
from luthier.kernels.operands import rows_of, settings

HeadPass = Callable[
    [tuple[Tensor, Tensor, Tensor, Tensor | None], Tensor, list[float], dict[str, Tensor]], None
]
"""`head_pass` in C++ or Triton."""


def head_pass(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor | None],
    rows_M: Tensor,
    numbers: list[float],
    outputs: dict[str, Tensor],
) -> None:
    """Run the kernel on (hidden, weight, target, token weight float32 or None) for the chosen rows.

    `numbers` are softcap, label smoothing, z-loss and bytes for logits; `outputs` holds `loss` [M] and, where they
    are wanted, `grad_hidden` [M, D], `entropy` [M], `grad_entropy` [M, D], all float32 and contiguous.
    """
    hidden_ND, weight_VD, target_N = rows_of(tensors[0]), rows_of(tensors[1]), tensors[2].contiguous()
    token_weight_N = tensors[3]
    problem = {
        "hidden": hidden_ND.data_ptr(),
        "weight": weight_VD.data_ptr(),
        "target": target_N.data_ptr(),
        "token_weight": 0 if token_weight_N is None else token_weight_N.data_ptr(),
        "rows": rows_M.data_ptr(),
        "num_rows": rows_M.numel(),
        "dim": weight_VD.shape[1],
        "vocab": weight_VD.shape[0],
        "hidden_stride": hidden_ND.stride(0),
        "weight_stride": weight_VD.stride(0),
        "softcap": numbers[0],
        "label_smoothing": numbers[1],
        "z_loss": numbers[2],
        "bfloat16": hidden_ND.dtype == torch.bfloat16,
    }
    for name in ("loss", "grad_hidden", "entropy", "grad_entropy"):
        problem[name] = outputs[name].data_ptr() if name in outputs else 0
    _core.linear_cross_entropy(problem, **settings())


@kernel_op("luthier::linear_cross_entropy")
def linear_cross_entropy_op(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    token_weight_N: Tensor,
    ignore_index: int,
    numbers: list[float],
    need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Summed loss (float32 scalar), its gradient to the counted rows (float32 [M, D]; empty if not needed), and these.

    The head is taken as frozen. Targets other than `ignore_index` must lie in [0, V). Token weights are float64, which
    autocast leaves alone, or of no elements: all 1. `numbers` are softcap, label smoothing, z-loss and the bytes that
    logits may take at a time, which C++ has no use for.
    """
    loss_M, grad_MD, rows_M = counted_losses(
        head_pass, (hidden_ND, weight_VD, target_N, token_weight_N), ignore_index, numbers, need_grad
    )
    # A float64 sum in one thread: its order, and so its bits, must not depend on the number of threads.
    return torch.tensor(sum(loss_M.tolist()), dtype=torch.float32, device="cpu"), grad_MD, rows_M


def counted_losses(
    run: HeadPass,
    tensors: tuple[Tensor, Tensor, Tensor, Tensor],
    ignore_index: int,
    numbers: list[float],
    need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses [M] and gradients [M, D] (empty if not needed) of the counted rows, float32, and these rows."""
    hidden_ND, weight_VD, target_N, token_weight_N = tensors
    rows_M = (target_N != ignore_index).nonzero().squeeze(1)
    count, dim = rows_M.numel(), hidden_ND.shape[1]
    empty = partial(torch.empty, dtype=torch.float32, device=hidden_ND.device)
    outputs = {"loss": empty(count)}
    if need_grad:
        outputs["grad_hidden"] = empty(count, dim)
    weight_N = token_weight_N.float().contiguous() if token_weight_N.numel() else None
    run((hidden_ND, weight_VD, target_N, weight_N), rows_M, numbers, outputs)
    return outputs["loss"], outputs.get("grad_hidden", empty(0, dim)), rows_M


@linear_cross_entropy_op.register_fake
def _(
    hidden_ND: Tensor,
    _weight_VD: Tensor,
    _target_N: Tensor,
    _token_weight_N: Tensor,
    _ignore_index: int,
    _numbers: list[float],
    need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    count = torch.library.get_ctx().new_dynamic_size()
    grad_MD = hidden_ND.new_empty(count if need_grad else 0, hidden_ND.shape[1], dtype=torch.float32)
    loss_sum = hidden_ND.new_empty((), dtype=torch.float32)
    return loss_sum, grad_MD, hidden_ND.new_empty(count, dtype=torch.int64)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    if inputs[1].requires_grad:
        raise ValueError("our kernels need a frozen head, got weight.requires_grad=True")
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.save_for_backward(output[1], output[2])
    ctx.shape, ctx.dtype = inputs[0].shape, inputs[0].dtype


def _backward(ctx: Any, grad_loss: Tensor, *_others: Any) -> tuple[Tensor | None, ...]:
    grad_MD, rows_M = ctx.saved_tensors
    grad_ND = grad_MD.new_zeros(ctx.shape, dtype=ctx.dtype)
    grad_ND[rows_M] = (grad_MD * grad_loss).to(ctx.dtype)
    return grad_ND, None, None, None, None, None, None


linear_cross_entropy_op.register_autograd(_backward, _keep)
