"""The Triton kernels of the LoRA linear ops, and how they are launched: also on chips that do not take all of them yet.

Nothing is added up by atomics: sums over rows are formed in slices, which are then added in order.

M rows, K inputs, N outputs, R rank, Q the ranks of all projections together.
"""

import triton
import triton.language as tl

from luthier.kernels.gpu import Launch, Launches
from luthier.kernels.tiles import inner_tile, kept_tile, outer_tile, place, place_of, tile, turned_tile

SHRINK: Launches = {
    "*": Launch(tiles={"BLOCK_M": 64, "BLOCK_K": 64}, num_warps=4, num_stages=3),
    "sm_90": Launch(tiles={"BLOCK_M": 16, "BLOCK_K": 128}, num_warps=4, num_stages=3),
    "gfx942": Launch(tiles={"BLOCK_M": 64, "BLOCK_K": 64}, num_warps=4, num_stages=2),
}
EXPAND: Launches = {
    "*": Launch(tiles={"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64}, num_warps=8, num_stages=3),
}
INPUT_GRADIENT: Launches = {
    "*": Launch(tiles={"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32}, num_warps=8, num_stages=3),
    "sm_80": Launch(tiles={"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64}, num_warps=8, num_stages=3),
    "sm_90": Launch(tiles={"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64}, num_warps=8, num_stages=3),
    "sm_100": Launch(tiles={"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64}, num_warps=8, num_stages=3),
    "gfx942": Launch(tiles={"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64}, num_warps=8, num_stages=2),
    "float32": Launch(tiles={"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32}, num_warps=4, num_stages=2),
}
# The random words of a tile take registers.
DROPPED_INPUT_GRADIENT: Launches = {
    **INPUT_GRADIENT,
    "sm_90": Launch(tiles={"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64}, num_warps=8, num_stages=3),
    "sm_100": Launch(tiles={"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64}, num_warps=8, num_stages=3),
}
GRAM: Launches = {
    "*": Launch(tiles={"BLOCK_M": 64, "BLOCK_N": 64}, num_warps=4, num_stages=3),
    "sm_100": Launch(tiles={"BLOCK_M": 64, "BLOCK_N": 64}, num_warps=8, num_stages=3),
}
ROUND = Launch(tiles={"BLOCK": 1024})
SUM = Launch(tiles={"BLOCK": 1024})
# Specialising on these would compile a kernel anew for a seed that is divisible by 16, or a stream of 1.
_COUNTERS = ["seed", "stream", "row0", "threshold", "keep_scale"]
# Where factors stand and end says nothing of how they are to be read.
_SIZES = [f"size{index}" for index in range(6)] + [f"start{index}" for index in range(1, 6)]


@triton.jit(do_not_specialize=_COUNTERS)
def shrink_kernel(
    x, a, s, x_stride, s_stride, M, K, Q,
    seed, stream, row0, threshold, keep_scale, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """S = dropped(x) A^T: one tile of rows, all ranks of a block."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    ranks = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    total = tl.zeros([BLOCK_M, BLOCK_Q], dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        left = tile(x, rows, columns, x_stride, M, K)
        kept = kept_tile(tl.program_id(0) * BLOCK_M, start, row0, seed, stream, threshold, BLOCK_M, BLOCK_K)
        left = tl.where(kept, left.to(tl.float32) * keep_scale, 0.0).to(x.dtype.element_ty)
        right = turned_tile(a, ranks, columns, K, Q, K)
        total = tl.dot(left, right, total, input_precision=PRECISION)
    mask = (rows[:, None] < M) & (ranks[None, :] < Q)
    target = s + rows[:, None].to(tl.int64) * s_stride + ranks[None, :]
    tl.store(target, total.to(s.dtype.element_ty), mask=mask)


@triton.jit
def expand_kernel(
    x, weight, y, s, b, bias, s_stride, M, N, K, R,
    HAS_BIAS: tl.constexpr, PROGRAMS: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Y = S B^T + x W^T + bias, B already scaled: the update begins the accumulator.

    x, weight and y are tensor descriptors: tiles of the first two come, and half tiles of y go, by the copy engine.
    Each of PROGRAMS takes every so many tiles.
    """
    for index in tl.range(tl.program_id(0), tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N), PROGRAMS):
        tile_m, tile_n = place_of(index, M, N, BLOCK_M, BLOCK_N, GROUP)
        rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        outputs = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        for start in range(0, R, BLOCK_R):
            ranks = start + tl.arange(0, BLOCK_R)
            left = tile(s, rows, ranks, s_stride, M, R)
            total = tl.dot(left, turned_tile(b, outputs, ranks, R, N, R), total)
        for start in range(0, K, BLOCK_K):
            left = x.load([tile_m * BLOCK_M, start])
            total = tl.dot(left, weight.load([tile_n * BLOCK_N, start]).T, total)
        if HAS_BIAS:
            total += tl.load(bias + outputs, mask=outputs < N, other=0.0).to(tl.float32)[None, :]
        halves = tl.permute(tl.reshape(total, [BLOCK_M, 2, BLOCK_N // 2]), [0, 2, 1])
        first, second = tl.split(halves)
        y.store([tile_m * BLOCK_M, tile_n * BLOCK_N], first.to(y.dtype))
        y.store([tile_m * BLOCK_M, tile_n * BLOCK_N + BLOCK_N // 2], second.to(y.dtype))


@triton.jit(do_not_specialize=_COUNTERS)
def input_gradient_kernel(
    grad0, grad1, grad2, weight0, weight1, weight2, ds, a, dx,
    stride0, stride1, stride2, turn0, turn1, turn2, M, K, Q, N0, N1, N2,
    seed, stream, row0, threshold, keep_scale,
    COUNT: tl.constexpr, DROPOUT: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Dx = undropped(dS A) + the sum of dy W of COUNT projections, BLOCK_K outputs at a time. EVEN: it divides all."""
    tile_m, tile_n = place(M, K, BLOCK_M, BLOCK_N, GROUP)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(0, Q, BLOCK_R):
        ranks = start + tl.arange(0, BLOCK_R)
        left = tile(ds, rows, ranks, Q, M, Q)
        total = tl.dot(left, tile(a, ranks, columns, K, Q, K), total, input_precision=PRECISION)
    if DROPOUT:
        kept = kept_tile(tile_m * BLOCK_M, tile_n * BLOCK_N, row0, seed, stream, threshold, BLOCK_M, BLOCK_N)
        total = tl.where(kept, total * keep_scale, 0.0)
    # What lies beyond the last row or column begins anew, and is not stored: no mask stands in the loop.
    there, found = rows % M, columns % K
    for start in range(0, N0, BLOCK_K):
        outputs = start + tl.arange(0, BLOCK_K)
        left = inner_tile(grad0, there, outputs, stride0, N0, EVEN)
        right = outer_tile(weight0, outputs, found, turn0, N0, EVEN)
        total = tl.dot(left, right, total, input_precision=PRECISION)
    if COUNT > 1:
        for start in range(0, N1, BLOCK_K):
            outputs = start + tl.arange(0, BLOCK_K)
            left = inner_tile(grad1, there, outputs, stride1, N1, EVEN)
            right = outer_tile(weight1, outputs, found, turn1, N1, EVEN)
            total = tl.dot(left, right, total, input_precision=PRECISION)
    if COUNT > 2:
        for start in range(0, N2, BLOCK_K):
            outputs = start + tl.arange(0, BLOCK_K)
            left = inner_tile(grad2, there, outputs, stride2, N2, EVEN)
            right = outer_tile(weight2, outputs, found, turn2, N2, EVEN)
            total = tl.dot(left, right, total, input_precision=PRECISION)
    mask = (rows[:, None] < M) & (columns[None, :] < K)
    tl.store(dx + rows[:, None].to(tl.int64) * K + columns[None, :], total.to(dx.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_COUNTERS)
def gram_kernel(
    low, x, slices, low_stride, x_stride, M, Q, K, slice_rows,
    seed, stream, row0, threshold, keep_scale,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """This slice's part of low^T dropped(x), for one block of x's columns and one of ranks."""
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    ranks = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    first = tl.program_id(2) * slice_rows
    last = tl.minimum(first + slice_rows, M)
    total = tl.zeros([BLOCK_N, BLOCK_Q], dtype=tl.float32)
    for start in range(first, last, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        left = tile(x, rows, columns, x_stride, last, K)
        if DROPOUT:
            kept = kept_tile(
                start, tl.program_id(0) * BLOCK_N, row0, seed, stream, threshold, BLOCK_M, BLOCK_N
            )
            left = tl.where(kept, left.to(tl.float32) * keep_scale, 0.0).to(x.dtype.element_ty)
        right = tile(low, rows, ranks, low_stride, last, Q)
        total = tl.dot(tl.trans(left), right, total, input_precision=PRECISION)
    part = slices + tl.program_id(2).to(tl.int64) * Q * K
    mask = (ranks[None, :] < Q) & (columns[:, None] < K)
    tl.store(part + ranks[None, :].to(tl.int64) * K + columns[:, None], total, mask=mask)


@triton.jit
def _round_piece(source, target, size, scale, BLOCK: tl.constexpr):
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(source + places, mask=places < size, other=0.0).to(tl.float32) * scale
    tl.store(target + places, values.to(target.dtype.element_ty), mask=places < size)


@triton.jit(do_not_specialize=_SIZES)
def round_kernel(
    a0, a1, a2, b0, b1, b2, out,
    size0, size1, size2, size3, size4, size5, start1, start2, start3, start4, start5, scale0, scale1, scale2,
    COUNT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """All A of COUNT projections, then all B times their scales, rounded: a program takes a piece of one factor."""
    which = tl.program_id(1)
    if which == 0:
        _round_piece(a0, out, size0, 1.0, BLOCK)
    if which == COUNT:
        _round_piece(b0, out + start3, size3, scale0, BLOCK)
    if COUNT > 1:
        if which == 1:
            _round_piece(a1, out + start1, size1, 1.0, BLOCK)
        if which == COUNT + 1:
            _round_piece(b1, out + start4, size4, scale1, BLOCK)
    if COUNT > 2:
        if which == 2:
            _round_piece(a2, out + start2, size2, 1.0, BLOCK)
        if which == COUNT + 2:
            _round_piece(b2, out + start5, size5, scale2, BLOCK)


@triton.jit
def sum_slices_kernel(slices, out, count, size, BLOCK: tl.constexpr):
    """Out = the sum of the slices, in their order."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    part = slices + places
    for _ in range(count):
        total += tl.load(part, mask=places < size, other=0.0)
        part += size
    tl.store(out + places, total, mask=places < size)
