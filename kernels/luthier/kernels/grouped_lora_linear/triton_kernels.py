"""Triton kernels of `grouped_lora_linear`: what a program works on stands in tables (`work.py`).

Shape suffixes: M rows, K inputs, N outputs, R the greatest rank.
"""

import triton
import triton.language as tl

from luthier.kernels.gpu import Launch, Launches
from luthier.kernels.grouped_lora_linear.work import PART_FIELDS, SUM_FIELDS, WORK_FIELDS
from luthier.kernels.tiles import inner_tile, kept_tile, outer_tile, place, tile, turned_tile

SHRINK: Launches = {
    "*": Launch(tiles={"BLOCK_M": 64, "BLOCK_K": 64}, num_warps=4, num_stages=3),
    "gfx942": Launch(tiles={"BLOCK_M": 64, "BLOCK_K": 64}, num_warps=4, num_stages=2),
}
EXPAND: Launches = {
    "float32": Launch(tiles={"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32}, num_warps=4, num_stages=2),
    "*": Launch(tiles={"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32}, num_warps=8, num_stages=3),
    "sm_80": Launch(tiles={"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64}, num_warps=8, num_stages=3),
    "sm_90": Launch(tiles={"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64}, num_warps=8, num_stages=3),
    "sm_100": Launch(tiles={"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64}, num_warps=8, num_stages=3),
    "gfx942": Launch(tiles={"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64}, num_warps=8, num_stages=2),
}
INPUT_GRADIENT: Launches = EXPAND
GRAM: Launches = {"*": Launch(tiles={"BLOCK_M": 64, "BLOCK_N": 64}, num_warps=4, num_stages=3)}
SUM = Launch(tiles={"BLOCK": 1024})
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
    HAS_BIAS: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Y = S B^T of each row's own adapter + x W^T + bias; b holds B^T, already scaled. EVEN: BLOCK_K divides K."""
    tile_m, tile_n = place(M, N, BLOCK_M, BLOCK_N, GROUP)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    outputs = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    total = low_rank(
        s, b, parts, bounds + 2 * tile_m, rows, tile_m * BLOCK_M, tile_n * BLOCK_N, R, N,
        False, PRECISION, BLOCK_M, BLOCK_N, BLOCK_R,
    )  # fmt: skip
    # What lies beyond the last row or output begins anew, and is not stored: no mask stands in the loop.
    there, found = rows % M, outputs % N
    for start in range(0, K, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        left = inner_tile(x, there, columns, x_stride, K, EVEN)
        right = tl.trans(inner_tile(weight, found, columns, weight_stride, K, EVEN))
        total = tl.dot(left, right, total, input_precision=PRECISION)
    if HAS_BIAS:
        total += tl.load(bias + outputs, mask=outputs < N, other=0.0).to(tl.float32)[None, :]
    mask = (rows[:, None] < M) & (outputs[None, :] < N)
    tl.store(y + rows[:, None].to(tl.int64) * N + outputs[None, :], total.to(y.dtype.element_ty), mask=mask)


@triton.jit
def input_gradient_kernel(
    grad, weight, ds, a, dx, parts, bounds, grad_stride, weight_stride, M, N, K, R,
    DROPOUT: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Dx = undropped(dS A) of each row's own adapter + dy W, BLOCK_K outputs at a time. EVEN: it divides N."""
    tile_m, tile_n = place(M, K, BLOCK_M, BLOCK_N, GROUP)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    total = low_rank(
        ds, a, parts, bounds + 2 * tile_m, rows, tile_m * BLOCK_M, tile_n * BLOCK_N, R, K,
        DROPOUT, PRECISION, BLOCK_M, BLOCK_N, BLOCK_R,
    )  # fmt: skip
    # As in expand_kernel.
    there, found = rows % M, columns % K
    for start in range(0, N, BLOCK_K):
        outputs = start + tl.arange(0, BLOCK_K)
        left = inner_tile(grad, there, outputs, grad_stride, N, EVEN)
        right = outer_tile(weight, outputs, found, weight_stride, N, EVEN)
        total = tl.dot(left, right, total, input_precision=PRECISION)
    mask = (rows[:, None] < M) & (columns[None, :] < K)
    tl.store(dx + rows[:, None].to(tl.int64) * K + columns[None, :], total.to(dx.dtype.element_ty), mask=mask)


@triton.jit
def gram_kernel(
    low, x, parts, work, x_stride, K, R,
    DROPOUT: tl.constexpr, SCALED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """This slice's part of one adapter's low^T dropped(x), for a block of columns and one of ranks."""
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
        right = tile(low, rows, ranks, R, last, rank)
        total = tl.dot(tl.trans(left), right, total, input_precision=PRECISION)
    if SCALED:
        total *= number(part + 9)
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
