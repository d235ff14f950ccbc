"""`grouped_lora_linear` in Triton: tiles of the rows of one adapter each, and products whose tiles may hold several.

What a program works on stands in tables that the host fills: nothing of them is compiled in, so batches of any
adapters, ranks and segments share their kernels. Nothing is added up by atomics.

Shape suffixes: M rows, K inputs, N outputs, R the greatest rank, Q the ranks of all adapters together.
"""

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from luthier.kernels.gpu import Launch, covering, enqueue, launch_for, precision, slice_height
from luthier.kernels.grouped_lora_linear.cpu import (
    Part,
    grouped_lora_linear_backward_op,
    grouped_lora_linear_op,
    parts_of,
)
from luthier.kernels.grouped_lora_linear.triton_kernels import (
    EXPAND,
    GRAM,
    INPUT_GRADIENT,
    SHRINK,
    SUM,
    expand_kernel,
    gram_kernel,
    input_gradient_kernel,
    shrink_kernel,
    sum_kernel,
)
from luthier.kernels.grouped_lora_linear.work import (
    SUM_FIELDS,
    WORK_FIELDS,
    Slices,
    bounds_table,
    cut,
    parts_table,
    sent,
    work_table,
)
from luthier.kernels.operands import rows_of

_GROUP_ROWS = 8
# Ranks that a product of many adapters takes at a time: an adapter of rank 8 pays for 16, not for another's 64.
_BLOCK_R = 16
# Most ranks in a block.
_WIDEST = 128


def _sum(sums: Tensor, size: int) -> None:
    """Form the sums of a table; `size` is the elements of the greatest."""
    if num_sums := len(sums) // SUM_FIELDS:
        enqueue(sum_kernel, (num_sums, triton.cdiv(size, SUM.tiles["BLOCK"])), (sums,), {}, SUM)


def _rounded(factors: list[Tensor], numbers: list[float], dtype: torch.dtype) -> Tensor:
    """All A, then all B^T times their scales, one after the other, rounded to the activations' type."""
    count = len(factors) // 2
    a, bt = factors[:count], [b.T for b in factors[count:]]
    out = torch.empty(sum(factor.numel() for factor in factors), dtype=dtype, device=a[0].device)
    a_QK, bt_QN = _factors_of(out, factors)
    torch.cat(a, out=a_QK)
    scales = [scale for scale, factor in zip(numbers, a, strict=False) for _ in range(factor.shape[0])]
    torch.mul(
        torch.cat(bt),
        torch.tensor(scales, dtype=torch.float32, device="cpu").to(out.device, non_blocking=True)[:, None],
        out=bt_QN,
    )
    return out


def _factors_of(rounded: Tensor, factors: list[Tensor]) -> tuple[Tensor, Tensor]:
    """A [Q, K] and B^T [Q, N] of what `_rounded` gave."""
    count = len(factors) // 2
    K, N = factors[0].shape[1], factors[count].shape[0]
    split = sum(a.numel() for a in factors[:count])
    return rounded[:split].view(-1, K), rounded[split:].view(-1, N)


@grouped_lora_linear_op.on_gpu
def grouped_lora_linear_triton(
    x_MK: Tensor,
    weight_NK: Tensor,
    bias_N: Tensor,
    factors: list[Tensor],
    numbers: list[float],
    segments: list[int],
    keys: list[int],
) -> list[Tensor]:
    """[y [M, N], S [M, R], all A and B^T rounded], as the C++ kernel."""
    x_MK, weight_NK = rows_of(x_MK), rows_of(weight_NK)
    (M, K), N, device = x_MK.shape, weight_NK.shape[0], x_MK.device
    parts = parts_of(factors, numbers, segments, keys)
    R = max(a.shape[0] for a in factors[: len(factors) // 2])
    rounded = _rounded(factors, numbers, x_MK.dtype)
    a_QK, bt_QN = _factors_of(rounded, factors)
    s_MR, y_MN = x_MK.new_empty(M, R), x_MK.new_empty(M, N)
    expand = launch_for(EXPAND, x_MK)
    table, work, bounds = sent(
        device,
        parts_table(parts, numbers),
        _shrink_work(parts, R, x_MK),
        bounds_table(parts, M, expand.tiles["BLOCK_M"]),
    )
    _shrink((x_MK, a_QK, s_MR), (table, work), _drops(parts))
    if M:
        grid = (triton.cdiv(M, expand.tiles["BLOCK_M"]) * triton.cdiv(N, expand.tiles["BLOCK_N"]),)
        tensors = x_MK, weight_NK, bias_N.contiguous(), s_MR, bt_QN, y_MN, table, bounds
        enqueue(
            expand_kernel,
            grid,
            (*tensors, x_MK.stride(0), weight_NK.stride(0), M, N, K, R),
            {"HAS_BIAS": bias_N.numel() > 0, **_of_product(x_MK, expand)},
            expand,
        )
    return [y_MN, s_MR, rounded]


def _of_product(left: Tensor, launch: Launch) -> dict[str, int | str]:
    """The constants of a product with the frozen weight, whose left side is this."""
    even = left.shape[1] % launch.tiles["BLOCK_K"] == 0
    return {"EVEN": even, "PRECISION": precision(left), "GROUP": _GROUP_ROWS, "BLOCK_R": _BLOCK_R}


def _drops(parts: Sequence[Part]) -> bool:
    return any(part.probability > 0 for part in parts)


def _shrink_work(parts: Sequence[Part], R: int, x_MK: Tensor) -> list[int]:
    height = launch_for(SHRINK, x_MK).tiles["BLOCK_M"]
    return work_table(parts, cut(parts, height), min(_WIDEST, covering(R, 16)))


def _shrink(matrices: tuple[Tensor, Tensor, Tensor], tables: tuple[Tensor, Tensor], drops: bool) -> None:
    """Of (x, A, S): write each part's dropped(x) A^T into S."""
    x_MK, a_QK, s_MR = matrices
    R, launch = s_MR.shape[1], launch_for(SHRINK, x_MK)
    if count := len(tables[1]) // WORK_FIELDS:
        operands = x_MK, a_QK, s_MR, *tables, x_MK.stride(0), x_MK.shape[1], R
        block = min(_WIDEST, covering(R, 16))
        constants = {"DROPOUT": drops, "PRECISION": precision(x_MK), "BLOCK_R": block}
        enqueue(shrink_kernel, (count,), operands, constants, launch)


def _gram_slices(parts: Sequence[Part], ranks: list[int], x_MK: Tensor) -> Slices:
    """Slices of a sum over the rows of x."""
    (M, K), tiles = x_MK.shape, launch_for(GRAM, x_MK).tiles
    blocks = triton.cdiv(K, tiles["BLOCK_N"]) * triton.cdiv(max(ranks), _WIDEST)
    return Slices(parts, cut(parts, slice_height(M, blocks, tiles["BLOCK_M"])), ranks, K, x_MK.device)


def _gram(
    matrices: tuple[Tensor, Tensor], tables: tuple[Tensor, Tensor], *, drops: bool, scaled: bool
) -> None:
    """Of (low, x): write each part's low^T dropped(x) where its work says."""
    low_MR, x_MK = matrices
    K, R, launch = x_MK.shape[1], low_MR.shape[1], launch_for(GRAM, x_MK)
    if count := len(tables[1]) // WORK_FIELDS:
        constants = {"DROPOUT": drops, "SCALED": scaled, "PRECISION": precision(x_MK)}
        enqueue(
            gram_kernel,
            (triton.cdiv(K, launch.tiles["BLOCK_N"]), count),
            (low_MR, x_MK, *tables, x_MK.stride(0), K, R),
            {**constants, "BLOCK_R": min(_WIDEST, covering(R, 16))},
            launch,
        )


@grouped_lora_linear_backward_op.on_gpu
def grouped_lora_linear_backward_triton(
    grad_MN: Tensor,
    saved: list[Tensor],
    factors: list[Tensor],
    numbers: list[float],
    segments: list[int],
    keys: list[int],
    need_input: bool,
) -> list[Tensor]:
    """[dx (empty if not needed), dA..., dB...], as the C++ kernel; each dB the transpose of what is row-major."""
    x_MK, weight_NK, s_MR, grad_MN = rows_of(saved[0]), rows_of(saved[1]), saved[2], rows_of(grad_MN)
    a_QK, bt_QN = _factors_of(saved[3], factors)
    N, R, device = weight_NK.shape[0], s_MR.shape[1], x_MK.device
    parts = parts_of(factors, numbers, segments, keys)
    ranks = [a.shape[0] for a in factors[: len(factors) // 2]]
    width = min(_WIDEST, covering(R, 16))
    to_a = _gram_slices(parts, ranks, x_MK)
    to_b = _gram_slices(parts, ranks, grad_MN)
    table, low, work_b, work_a, sums, bounds = sent(
        device,
        parts_table(parts, numbers),
        _shrink_work(parts, R, grad_MN),
        work_table(parts, to_b.rows, width, to_b.places),
        work_table(parts, to_a.rows, width, to_a.places),
        to_b.sums + to_a.sums,
        bounds_table(parts, len(x_MK), launch_for(INPUT_GRADIENT, grad_MN).tiles["BLOCK_M"]),
    )
    ds_MR = torch.empty_like(s_MR)
    _shrink((grad_MN, bt_QN, ds_MR), (table, low), False)
    _gram((s_MR, grad_MN), (table, work_b), drops=False, scaled=True)
    _gram((ds_MR, x_MK), (table, work_a), drops=_drops(parts), scaled=False)
    _sum(sums, max(ranks) * max(N, x_MK.shape[1]))
    dx_MK = x_MK.new_empty(0)
    if need_input:
        dx_MK = _input_gradient((grad_MN, weight_NK, ds_MR, a_QK), (table, bounds), _drops(parts))
    return [dx_MK, *to_a.grads, *(grad.T for grad in to_b.grads)]


def _input_gradient(
    matrices: tuple[Tensor, Tensor, Tensor, Tensor], tables: tuple[Tensor, Tensor], drops: bool
) -> Tensor:
    """Gradient of x, [M, K], of (dy, weight, dS, A)."""
    grad_MN, weight_NK, ds_MR, a_QK = matrices
    (M, N), K = grad_MN.shape, weight_NK.shape[1]
    launch = launch_for(INPUT_GRADIENT, grad_MN)
    dx_MK = grad_MN.new_empty(M, K)
    if M:
        grid = (triton.cdiv(M, launch.tiles["BLOCK_M"]) * triton.cdiv(K, launch.tiles["BLOCK_N"]),)
        sizes = grad_MN.stride(0), weight_NK.stride(0), M, N, K, ds_MR.shape[1]
        enqueue(
            input_gradient_kernel,
            grid,
            (grad_MN, weight_NK, ds_MR, a_QK, dx_MK, *tables, *sizes),
            {"DROPOUT": drops, **_of_product(grad_MN, launch)},
            launch,
        )
    return dx_MK
