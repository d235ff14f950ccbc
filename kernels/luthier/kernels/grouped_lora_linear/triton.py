"""`grouped_lora_linear` in Triton: tiles of the rows of one adapter each, and products whose tiles may hold several.

What a program works on stands in tables that the host fills: nothing of them is compiled in, so batches of any
adapters, ranks and segments share their kernels. Nothing is added up by atomics.

Shape suffixes: M rows, K inputs, N outputs, R the greatest rank, Q the ranks of all adapters together.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from luthier.kernels.gpu import Launch, Launches, covering, launch_for, precision
from luthier.kernels.grouped_lora_linear.cpu import (
    Part,
    grouped_lora_linear_backward_op,
    grouped_lora_linear_op,
    parts_of,
)
from luthier.kernels.grouped_lora_linear.work import (
    PART_FIELDS,
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
from luthier.kernels.tiles import kept_tile, place, tile, turned_tile

SHRINK: Launches = {
    "*": Launch(tiles={"BLOCK_M": 64, "BLOCK_K": 64}, num_warps=4, num_stages=3),
    "gfx942": Launch(tiles={"BLOCK_M": 64, "BLOCK_K": 64}, num_warps=4, num_stages=2),
}
EXPAND: Launches = {
    "*": Launch(tiles={"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32}, num_warps=8, num_stages=3),
    "sm_80": Launch(tiles={"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64}, num_warps=8, num_stages=3),
    "sm_90": Launch(tiles={"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64}, num_warps=8, num_stages=3),
    "sm_100": Launch(tiles={"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64}, num_warps=8, num_stages=3),
    "gfx942": Launch(tiles={"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64}, num_warps=8, num_stages=2),
}
INPUT_GRADIENT: Launches = EXPAND
# An adapter's rows are often fewer than the 256 of `lora_linear`'s tiles.
RANK_GRADIENTS: Launches = {"*": Launch(tiles={"BLOCK_M": 128, "BLOCK_N": 64}, num_warps=8, num_stages=2)}
GRAM: Launches = {"*": Launch(tiles={"BLOCK_M": 64, "BLOCK_N": 64}, num_warps=4, num_stages=3)}
SUM: Launches = {"*": Launch(tiles={"BLOCK": 1024})}
_GRAM_SLICES = 8
_GROUP_ROWS = 8
# Ranks that a product of many adapters takes at a time: an adapter of rank 8 pays for 16, not for another's 64.
_BLOCK_R = 16
_PART = tl.constexpr(PART_FIELDS)
_WORK = tl.constexpr(WORK_FIELDS)
_SUM = tl.constexpr(SUM_FIELDS)


@triton.jit
def count(field):
    """A number of rows or ranks from a table: 32 bits take half the registers."""
    return tl.load(field).to(tl.int32)


@triton.jit
def number(field):
    """A float32 from a table."""
    return tl.load(field).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def floats_at(field):
    """Where a table's address points: float32, at a multiple of 16 bytes."""
    return tl.multiple_of(tl.load(field), 16).to(tl.pointer_type(tl.float32))


@triton.jit
def kept_of(part, first_row, first_column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Which elements of a tile the dropout of a part keeps."""
    seed, stream, row0, threshold = tl.load(part + 4), tl.load(part + 5), tl.load(part + 6), tl.load(part + 7)
    return kept_tile(first_row - tl.load(part), first_column, row0, seed, stream, threshold, ROWS, COLUMNS)


@triton.jit
def shrink_kernel(
    x, a, s, parts, work, x_stride, K, R,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """S = dropped(x) A^T for rows of one adapter and a block of its ranks."""
    work += tl.program_id(0) * _WORK
    part = parts + tl.load(work) * _PART
    first, last = count(work + 1), count(work + 2)
    rank = count(part + 2)
    a += tl.load(part + 3) * K
    rows = first + tl.arange(0, BLOCK_M)
    ranks = count(work + 3) + tl.arange(0, BLOCK_R)
    total = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        left = tile(x, rows, columns, x_stride, last, K)
        if DROPOUT:
            kept = kept_of(part, first, start, BLOCK_M, BLOCK_K)
            left = tl.where(kept, left.to(tl.float32) * number(part + 8), 0.0).to(x.dtype.element_ty)
        total = tl.dot(left, turned_tile(a, ranks, columns, K, rank, K), total, input_precision=PRECISION)
    mask = (rows[:, None] < last) & (ranks[None, :] < rank)
    out = s + rows[:, None].to(tl.int64) * R + ranks[None, :]
    tl.store(out, total.to(s.dtype.element_ty), mask=mask)


@triton.jit
def low_rank(
    low, factor, parts, bounds, rows, first_row, first_column, R, columns_end,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The updates of a tile of rows by all parts that reach into it: low times each part's own factor.

    Rows of others are taken out after the product, so that what is not finite in one adapter stays in its rows.
    """
    total = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    columns = first_column + tl.arange(0, COLUMNS)
    for index in range(tl.load(bounds), tl.load(bounds + 1)):
        part = parts + index * _PART
        rank = count(part + 2)
        own = factor + tl.load(part + 3) * columns_end
        inside = (rows >= count(part)) & (rows < count(part + 1))
        for start in range(0, rank, BLOCK_R):
            ranks = start + tl.arange(0, BLOCK_R)
            mask = inside[:, None] & (ranks[None, :] < rank)
            left = tl.load(low + rows[:, None].to(tl.int64) * R + ranks[None, :], mask=mask, other=0.0)
            right = tile(own, ranks, columns, columns_end, rank, columns_end)
            added = tl.dot(left, right, total, input_precision=PRECISION)
            total = tl.where(inside[:, None], added, total)
        if DROPOUT:
            kept = kept_of(part, first_row, first_column, ROWS, COLUMNS)
            undropped = tl.where(kept, total * number(part + 8), 0.0)
            total = tl.where(inside[:, None], undropped, total)
    return total


@triton.jit
def expand_kernel(
    x, weight, bias, s, b, y, parts, bounds, x_stride, weight_stride, M, N, K, R,
    HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Y = S B^T of each row's own adapter + x W^T + bias; b holds B^T, already scaled."""
    tile_m, tile_n = place(M, N, BLOCK_M, BLOCK_N, GROUP)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    outputs = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    total = low_rank(
        s, b, parts, bounds + 2 * tile_m, rows, tile_m * BLOCK_M, tile_n * BLOCK_N, R, N,
        False, PRECISION, BLOCK_M, BLOCK_N, BLOCK_R,
    )  # fmt: skip
    for start in range(0, K, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        left = tile(x, rows, columns, x_stride, M, K)
        right = turned_tile(weight, outputs, columns, weight_stride, N, K)
        total = tl.dot(left, right, total, input_precision=PRECISION)
    if HAS_BIAS:
        total += tl.load(bias + outputs, mask=outputs < N, other=0.0).to(tl.float32)[None, :]
    mask = (rows[:, None] < M) & (outputs[None, :] < N)
    tl.store(y + rows[:, None].to(tl.int64) * N + outputs[None, :], total.to(y.dtype.element_ty), mask=mask)


@triton.jit
def input_gradient_kernel(
    grad, weight, ds, a, dx, parts, bounds, grad_stride, weight_stride, M, N, K, R,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Dx = undropped(dS A) of each row's own adapter + dy W; BLOCK_K outputs are contracted at a time."""
    tile_m, tile_n = place(M, K, BLOCK_M, BLOCK_N, GROUP)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    total = low_rank(
        ds, a, parts, bounds + 2 * tile_m, rows, tile_m * BLOCK_M, tile_n * BLOCK_N, R, K,
        DROPOUT, PRECISION, BLOCK_M, BLOCK_N, BLOCK_R,
    )  # fmt: skip
    for start in range(0, N, BLOCK_K):
        outputs = start + tl.arange(0, BLOCK_K)
        left = tile(grad, rows, outputs, grad_stride, M, N)
        right = tile(weight, outputs, columns, weight_stride, N, K)
        total = tl.dot(left, right, total, input_precision=PRECISION)
    mask = (rows[:, None] < M) & (columns[None, :] < K)
    tl.store(dx + rows[:, None].to(tl.int64) * K + columns[None, :], total.to(dx.dtype.element_ty), mask=mask)


@triton.jit
def rank_gradients_kernel(
    grad, s, b, ds, parts, work, grad_stride, N, R,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """In one pass over rows of one adapter: dS = dy B, and this slice's part of its dB^T; b holds B^T, scaled."""
    work += tl.program_id(0) * _WORK
    part = parts + tl.load(work) * _PART
    last, rank = count(work + 2), count(part + 2)
    b += tl.load(part + 3) * N
    rows = count(work + 1) + tl.arange(0, BLOCK_M)
    ranks = count(work + 3) + tl.arange(0, BLOCK_R)
    low = tl.trans(tile(s, rows, ranks, R, last, rank))
    total = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
    out = floats_at(work + 4) + ranks[:, None] * N
    for start in range(0, N, BLOCK_N):
        outputs = start + tl.arange(0, BLOCK_N)
        left = tile(grad, rows, outputs, grad_stride, last, N)
        total = tl.dot(left, turned_tile(b, ranks, outputs, N, rank, N), total, input_precision=PRECISION)
        found = tl.dot(low, left, input_precision=PRECISION) * number(part + 9)
        tl.store(out + outputs[None, :], found, mask=(ranks[:, None] < rank) & (outputs[None, :] < N))
    mask = (rows[:, None] < last) & (ranks[None, :] < rank)
    out = ds + rows[:, None].to(tl.int64) * R + ranks[None, :]
    tl.store(out, total.to(ds.dtype.element_ty), mask=mask)


@triton.jit
def gram_kernel(
    ds, x, parts, work, x_stride, K, R,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """This slice's part of one adapter's dA = dS^T dropped(x), for a block of columns and one of ranks."""
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    work += tl.program_id(1) * _WORK
    part = parts + tl.load(work) * _PART
    last, rank = count(work + 2), count(part + 2)
    ranks = count(work + 3) + tl.arange(0, BLOCK_R)
    total = tl.zeros([BLOCK_N, BLOCK_R], dtype=tl.float32)
    for start in range(count(work + 1), last, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        left = tile(x, rows, columns, x_stride, last, K)
        if DROPOUT:
            kept = kept_of(part, start, tl.program_id(0) * BLOCK_N, BLOCK_M, BLOCK_N)
            left = tl.where(kept, left.to(tl.float32) * number(part + 8), 0.0).to(x.dtype.element_ty)
        right = tile(ds, rows, ranks, R, last, rank)
        total = tl.dot(tl.trans(left), right, total, input_precision=PRECISION)
    out = floats_at(work + 4) + ranks[None, :] * K + columns[:, None]
    tl.store(out, total, mask=(ranks[None, :] < rank) & (columns[:, None] < K))


@triton.jit
def sum_kernel(sums, BLOCK: tl.constexpr):
    """Each sum of its slices, in their order; zero of none."""
    sums += tl.program_id(0) * _SUM
    slices = floats_at(sums)
    size, distance = tl.load(sums + 3), tl.multiple_of(tl.load(sums + 4), 4)
    places = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for _ in range(count(sums + 2)):
        total += tl.load(slices + places, mask=places < size, other=0.0)
        slices += distance
    tl.store(floats_at(sums + 1) + places, total, mask=places < size)


def _sum(sums: Tensor, size: int, device: torch.device) -> None:
    """Form the sums of a table; `size` is the elements of the greatest."""
    launch = launch_for(SUM, device)
    if num_sums := len(sums) // SUM_FIELDS:
        sum_kernel[(num_sums, triton.cdiv(size, launch.tiles["BLOCK"]))](sums, **launch.options)


def _rounded(factors: list[Tensor], numbers: list[float], dtype: torch.dtype) -> Tensor:
    """All A, then all B^T times their scales, one after the other, rounded to the activations' type."""
    count = len(factors) // 2
    a, bt = factors[:count], [b.T for b in factors[count:]]
    out = torch.empty(sum(factor.numel() for factor in factors), dtype=dtype, device=a[0].device)
    a_QK, bt_QN = _factors_of(out, factors)
    torch.cat(a, out=a_QK)
    scales = [scale for scale, factor in zip(numbers, a, strict=False) for _ in range(factor.shape[0])]
    torch.mul(torch.cat(bt), torch.tensor(scales, device=out.device)[:, None], out=bt_QN)
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
    launch, block = launch_for(SHRINK, device), min(128, covering(R, 16))
    expand = launch_for(EXPAND, device)
    rows = cut(parts, launch.tiles["BLOCK_M"])
    table, work, bounds = sent(
        device,
        parts_table(parts, numbers),
        work_table(parts, rows, block),
        bounds_table(parts, M, expand.tiles["BLOCK_M"]),
    )
    if parts:
        shrink_kernel[(len(work) // WORK_FIELDS,)](
            x_MK, a_QK, s_MR, table, work, x_MK.stride(0), K, R,
            DROPOUT=_drops(parts), PRECISION=precision(x_MK), BLOCK_R=block, **launch.options,
        )  # fmt: skip
    if M:
        grid = (triton.cdiv(M, expand.tiles["BLOCK_M"]) * triton.cdiv(N, expand.tiles["BLOCK_N"]),)
        expand_kernel[grid](
            x_MK, weight_NK, bias_N.contiguous(), s_MR, bt_QN, y_MN, table, bounds,
            x_MK.stride(0), weight_NK.stride(0), M, N, K, R,
            HAS_BIAS=bias_N.numel() > 0, PRECISION=precision(x_MK), GROUP=_GROUP_ROWS, BLOCK_R=_BLOCK_R,
            **expand.options,
        )  # fmt: skip
    return [y_MN, s_MR, rounded]


def _drops(parts: Sequence[Part]) -> bool:
    return any(part.probability > 0 for part in parts)


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
    (M, K), N, R, device = x_MK.shape, weight_NK.shape[0], s_MR.shape[1], x_MK.device
    parts = parts_of(factors, numbers, segments, keys)
    ranks = [a.shape[0] for a in factors[: len(factors) // 2]]
    first, second = launch_for(RANK_GRADIENTS, device), launch_for(GRAM, device)
    widths = min(64, covering(R, 16)), min(128, covering(R, 16))
    height = second.tiles["BLOCK_M"]
    slice_rows = max(1, triton.cdiv(triton.cdiv(M, _GRAM_SLICES), height)) * height
    rows = cut(parts, first.tiles["BLOCK_M"]), cut(parts, slice_rows)
    to_b, to_a = Slices(parts, rows[0], ranks, N, device), Slices(parts, rows[1], ranks, K, device)
    table, work_b, work_a, sums, bounds = sent(
        device,
        parts_table(parts, numbers),
        work_table(parts, rows[0], widths[0], to_b.places),
        work_table(parts, rows[1], widths[1], to_a.places),
        to_b.sums + to_a.sums,
        bounds_table(parts, M, launch_for(INPUT_GRADIENT, device).tiles["BLOCK_M"]) if need_input else [],
    )
    ds_MR = torch.empty_like(s_MR)
    shared = {"PRECISION": precision(x_MK)}
    if parts:
        rank_gradients_kernel[(len(work_b) // WORK_FIELDS,)](
            grad_MN, s_MR, bt_QN, ds_MR, table, work_b, grad_MN.stride(0), N, R,
            BLOCK_R=widths[0], **shared, **first.options,
        )  # fmt: skip
        gram_kernel[(triton.cdiv(K, second.tiles["BLOCK_N"]), len(work_a) // WORK_FIELDS)](
            ds_MR, x_MK, table, work_a, x_MK.stride(0), K, R,
            DROPOUT=_drops(parts), BLOCK_R=widths[1], **shared, **second.options,
        )  # fmt: skip
    _sum(sums, max(ranks) * max(N, K), device)
    dx_MK = x_MK.new_empty(0)
    if need_input:
        dx_MK = _input_gradient((grad_MN, weight_NK, ds_MR, a_QK), (table, bounds), _drops(parts))
    return [dx_MK, *to_a.grads, *(grad.T for grad in to_b.grads)]


def _input_gradient(
    operands: tuple[Tensor, Tensor, Tensor, Tensor], tables: tuple[Tensor, Tensor], drops: bool
) -> Tensor:
    """Gradient of x, [M, K], of (dy, weight, dS, A)."""
    grad_MN, weight_NK, ds_MR, a_QK = operands
    (M, N), K = grad_MN.shape, weight_NK.shape[1]
    launch = launch_for(INPUT_GRADIENT, grad_MN.device)
    dx_MK = grad_MN.new_empty(M, K)
    if M:
        grid = (triton.cdiv(M, launch.tiles["BLOCK_M"]) * triton.cdiv(K, launch.tiles["BLOCK_N"]),)
        input_gradient_kernel[grid](
            grad_MN, weight_NK, ds_MR, a_QK, dx_MK, *tables,
            grad_MN.stride(0), weight_NK.stride(0), M, N, K, ds_MR.shape[1],
            DROPOUT=drops, PRECISION=precision(grad_MN), GROUP=_GROUP_ROWS, BLOCK_R=_BLOCK_R, **launch.options,
        )  # fmt: skip
    return dx_MK
