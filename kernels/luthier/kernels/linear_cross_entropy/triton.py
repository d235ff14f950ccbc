"""The loss of a linear head in Triton: logits of as many rows as the budget allows, turned into gradients in place.

The products with the head are the vendor library's; a program takes one row of logits, once for its log-sum-exp and
once for its gradient. Shape suffixes: N rows, M counted rows, C rows of a chunk, D hidden size, V vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from luthier.kernels.gpu import Launch, Launches, enqueue, launch_for, product_float32
from luthier.kernels.linear_cross_entropy.cpu import counted_losses, linear_cross_entropy_op
from luthier.kernels.operands import rows_of

ROW: Launches = {
    "*": Launch(tiles={"BLOCK_V": 4096}, num_warps=8, num_stages=2),
    "sm_90": Launch(tiles={"BLOCK_V": 8192}, num_warps=32, num_stages=2),
}


@triton.jit
def _capped(logits, softcap, SOFTCAP: tl.constexpr):
    """Logits, capped, and the derivative of the cap."""
    if SOFTCAP:
        # cap * tanh(z / cap); 1 - tanh^2 as a product of sigmoids, which do not cancel.
        sigmoid = tl.sigmoid(2.0 * logits / softcap)
        slope = 4.0 * sigmoid * tl.sigmoid(-2.0 * logits / softcap)
        return softcap * (2.0 * sigmoid - 1.0), slope
    return logits, tl.full(logits.shape, 1.0, tl.float32)


@triton.jit
def _row_sums(row, V, softcap, SOFTCAP: tl.constexpr, BLOCK_V: tl.constexpr):
    """(log-sum-exp, mean, entropy of the softmax) of a row of logits."""
    # Of each lane by itself: the greatest value, the sums of exponentials, of values, and of exponentials times what
    # their values are below the greatest.
    greatest = tl.full([BLOCK_V], -3.0e38, tl.float32)
    total = tl.zeros([BLOCK_V], tl.float32)
    plain_sum = tl.zeros([BLOCK_V], tl.float32)
    below_sum = tl.zeros([BLOCK_V], tl.float32)
    for start in range(0, V, BLOCK_V):
        columns = start + tl.arange(0, BLOCK_V)
        mask = columns < V
        raw = tl.load(row + columns, mask=mask, other=0.0).to(tl.float32)
        values, _ = _capped(raw, softcap, SOFTCAP)
        higher = tl.maximum(greatest, tl.where(mask, values, -3.0e38))
        rescale = tl.exp(greatest - higher)
        shares = tl.where(mask, tl.exp(values - higher), 0.0)
        below_sum = (below_sum + (higher - greatest) * total) * rescale + shares * (higher - values)
        total = total * rescale + shares
        plain_sum += tl.where(mask, values, 0.0)
        greatest = higher
    top = tl.max(greatest, axis=0)
    lanes = tl.exp(greatest - top)
    mass = tl.sum(total * lanes, axis=0)
    below = tl.sum((below_sum + (top - greatest) * total) * lanes, axis=0) / mass
    return top + tl.log(mass), tl.sum(plain_sum, axis=0) / V, tl.log(mass) + below


@triton.jit
def row_kernel(
    logits, target, token_weight, loss, entropy, entropy_grads, row_stride, V,
    softcap, smoothing, z_loss,
    WEIGHTED: tl.constexpr, GRADIENT: tl.constexpr, ENTROPY: tl.constexpr, SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Loss (and entropy) of one row; its logits become their gradient, that of the entropy goes beside it."""
    number = tl.program_id(0).to(tl.int64)
    row = logits + number * row_stride
    wanted = tl.load(target + number)
    # Before the sums, whose barriers all warps pass: after them, another warp's gradient might stand here already.
    chosen, _ = _capped(tl.load(row + wanted).to(tl.float32) + tl.zeros([1], tl.float32), softcap, SOFTCAP)
    lse, mean, information = _row_sums(row, V, softcap, SOFTCAP, BLOCK_V)
    weight = tl.load(token_weight + number) if WEIGHTED else 1.0
    found = (1.0 - smoothing) * (lse - tl.sum(chosen, axis=0)) + smoothing * (lse - mean)
    tl.store(loss + number, (found + z_loss * lse * lse) * weight)
    if ENTROPY:
        tl.store(entropy + number, information)
    if GRADIENT:
        for start in range(0, V, BLOCK_V):
            columns = start + tl.arange(0, BLOCK_V)
            mask = columns < V
            raw = tl.load(row + columns, mask=mask, other=0.0).to(tl.float32)
            values, slope = _capped(raw, softcap, SOFTCAP)
            shares = tl.exp(values - lse)
            # The one-hot is taken away before anything is rounded.
            grads = shares * (1.0 + 2.0 * z_loss * lse) - smoothing / V
            grads -= tl.where(columns == wanted, 1.0 - smoothing, 0.0)
            if ENTROPY:
                moved = shares * (lse - values - information) * slope
                place = entropy_grads + number * row_stride + columns
                tl.store(place, moved.to(logits.dtype.element_ty), mask=mask)
            tl.store(row + columns, (grads * slope * weight).to(logits.dtype.element_ty), mask=mask)


def head_pass_triton(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor | None],
    rows_M: Tensor,
    numbers: list[float],
    outputs: dict[str, Tensor],
) -> None:
    """As `cpu.head_pass`."""
    hidden_ND, target_N, token_weight_N = tensors[0], tensors[2], tensors[3]
    weight_VD = rows_of(tensors[1])
    softcap, smoothing, z_loss, budget_bytes = numbers
    V = weight_VD.shape[0]
    gradient, with_entropy = "grad_hidden" in outputs, "entropy" in outputs
    buffers = 2 if gradient and with_entropy else 1
    size = max(1, int(budget_bytes) // (buffers * V * hidden_ND.element_size()))
    launch = launch_for(ROW, hidden_ND)
    constants = {
        "WEIGHTED": token_weight_N is not None,
        "GRADIENT": gradient,
        "ENTROPY": with_entropy,
        "SOFTCAP": softcap != 0,
    }
    for first in range(0, rows_M.numel(), size):
        rows_C = rows_M[first : first + size]
        part = slice(first, first + rows_C.numel())
        logits_CV = hidden_ND[rows_C] @ weight_VD.T
        moved_CV = torch.empty_like(logits_CV) if buffers == 2 else logits_CV
        given = target_N[rows_C], None if token_weight_N is None else token_weight_N[rows_C]
        found = outputs["loss"][part], outputs["entropy"][part] if with_entropy else None
        options = logits_CV.stride(0), V, softcap, smoothing, z_loss
        operands = logits_CV, *given, *found, moved_CV, *options
        enqueue(row_kernel, (rows_C.numel(),), operands, constants, launch)
        if gradient:
            outputs["grad_hidden"][part] = product_float32(logits_CV, weight_VD)
        if buffers == 2:
            outputs["grad_entropy"][part] = product_float32(moved_CV, weight_VD)


@linear_cross_entropy_op.on_gpu
def linear_cross_entropy_triton(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    token_weight_N: Tensor,
    ignore_index: int,
    numbers: list[float],
    need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Summed loss, its gradient to the counted rows and these, as the C++ kernel."""
    loss_M, grad_MD, rows_M = counted_losses(
        head_pass_triton, (hidden_ND, weight_VD, target_N, token_weight_N), ignore_index, numbers, need_grad
    )
    return loss_M.double().sum().float(), grad_MD, rows_M
