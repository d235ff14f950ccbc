"""The Triton kernels that read codes of 8 and 4 bits: what they stand for, and products with it, made tile by tile.

A tile of numbers is made where it is multiplied, and is never in the device's memory: of a weight that is read once,
as few rows do, its bytes are what takes time. The numbers are those of `dequantise`, rounded as there, so that only the
order of a sum tells these products from the library's. Nothing is added up by atomics: a contraction that is cut for
few rows is formed in slices, which are then added in order.

M rows, K inputs, N outputs, R rank.
"""

import triton
import triton.language as tl

from luthier.kernels.dequantise import NF4_BLOCK
from luthier.kernels.gpu import Launch, Launches
from luthier.kernels.tiles import inner_tile, place, tile, turned_tile

COLUMNS = NF4_BLOCK
"""Inputs of a tile of numbers: as many as share a scale in NF4, so that a tile has one for each of its rows."""

# A tile of `FEW` holds all rows. Numbers are the left side, made in registers, where Hopper takes them from.
FEW: Launches = {
    "*": Launch(tiles={"BLOCK_N": 64}, num_warps=4, num_stages=4),
    "gfx942": Launch(tiles={"BLOCK_N": 64}, num_warps=4, num_stages=2),
    "float32": Launch(tiles={"BLOCK_N": 32}, num_warps=4, num_stages=2),
}
MANY: Launches = {
    "*": Launch(tiles={"BLOCK_M": 128, "BLOCK_N": 128}, num_warps=8, num_stages=3),
    "gfx942": Launch(tiles={"BLOCK_M": 128, "BLOCK_N": 128}, num_warps=8, num_stages=2),
    "float32": Launch(tiles={"BLOCK_M": 32, "BLOCK_N": 32}, num_warps=4, num_stages=2),
}
FEW_GRADIENT: Launches = {
    "*": Launch(tiles={"BLOCK_N": 64}, num_warps=4, num_stages=3),
    # Four warps keep 16 bytes of INT8 in local memory there, with 80 of their 255 registers; no tile is another.
    "sm_100": Launch(tiles={"BLOCK_N": 64}, num_warps=8, num_stages=3),
    "gfx942": Launch(tiles={"BLOCK_N": 64}, num_warps=4, num_stages=2),
    "float32": Launch(tiles={"BLOCK_N": 32}, num_warps=4, num_stages=2),
}
MANY_GRADIENT: Launches = {
    "*": Launch(tiles={"BLOCK_M": 128, "BLOCK_N": 64}, num_warps=8, num_stages=3),
    "gfx942": Launch(tiles={"BLOCK_M": 128, "BLOCK_N": 64}, num_warps=8, num_stages=2),
    "float32": Launch(tiles={"BLOCK_M": 32, "BLOCK_N": 32}, num_warps=4, num_stages=2),
}
NUMBERS = Launch(tiles={"BLOCK_N": 32}, num_warps=4)
FINISH = Launch(tiles={"BLOCK": 1024})


@triton.jit
def numbers_tile(
    codes, scales, factors, mean, levels, outputs, first, K,
    TOGETHER: tl.constexpr, EVEN: tl.constexpr, COLUMNS: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """Numbers [outputs, COLUMNS inputs from `first` on] of a weight, in TYPE; all outputs exist.

    TOGETHER is how many scales of NF4's blocks share a factor; 0 is INT8, which has neither factors nor levels. Beyond
    the last input, which EVEN says is not met, INT8 gives zero; NF4's rows are whole blocks.
    """
    if TOGETHER == 0:
        columns = first + tl.arange(0, COLUMNS)
        pointers = codes + outputs[:, None].to(tl.int64) * K + columns[None, :]
        if EVEN:
            value = tl.load(pointers).to(tl.float32)
        else:
            value = tl.load(pointers, mask=columns[None, :] < K, other=0).to(tl.float32)
        scale = tl.load(scales + outputs).to(tl.float32)
    else:
        blocks = outputs.to(tl.int64) * (K // COLUMNS) + first // COLUMNS
        pairs = tl.load(codes + blocks[:, None] * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)[None, :])
        places = pairs.to(tl.int32)
        level = tl.join(tl.load(levels + (places >> 4)), tl.load(levels + (places & 15)))
        value = tl.reshape(level, [outputs.shape[0], COLUMNS]).to(tl.float32)
        # As torchao does it, in the type of the weight: a quotient, then a sum, each rounded.
        eighth, factor = tl.load(scales + blocks), tl.load(factors + blocks // TOGETHER)
        share = tl.div_rn(eighth.to(tl.float32), factor.to(tl.float32)).to(TYPE)
        scale = (share.to(tl.float32) + tl.load(mean).to(tl.float32)).to(TYPE).to(tl.float32)
    return (value * scale[:, None]).to(TYPE)


@triton.jit
def numbers_kernel(
    codes, scales, factors, mean, levels, out, N, K,
    TOGETHER: tl.constexpr, EVEN: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Out [N, K] = the numbers that the codes stand for."""
    outputs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.program_id(1) * COLUMNS
    columns = first + tl.arange(0, COLUMNS)
    found = numbers_tile(
        codes,
        scales,
        factors,
        mean,
        levels,
        outputs % N,
        first,
        K,
        TOGETHER,
        EVEN,
        COLUMNS,
        out.dtype.element_ty,
    )
    mask = (outputs[:, None] < N) & (columns[None, :] < K)
    tl.store(out + outputs[:, None].to(tl.int64) * K + columns[None, :], found, mask=mask)


@triton.jit
def product_kernel(
    x, codes, scales, factors, mean, levels, low, b, bias, out,
    x_stride, low_stride, M, N, K, R, slice_columns,
    TOGETHER: tl.constexpr, EVEN: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
    GROUP: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Out = low B^T + x W^T + bias of one slice of the inputs; the first slice has the update, which begins its sum."""
    tile_m, tile_n = place(M, N, BLOCK_M, BLOCK_N, GROUP)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    outputs = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(1)
    total = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    for start in range(0, tl.where(part == 0, R, 0), BLOCK_R):
        ranks = start + tl.arange(0, BLOCK_R)
        left = tile(b, outputs, ranks, R, N, R)
        total = tl.dot(
            left, turned_tile(low, rows, ranks, low_stride, M, R), total, input_precision=PRECISION
        )
    # What lies beyond the last row or output begins anew, and is not stored: no mask stands in the loop.
    there, found = rows % M, outputs % N
    first = part * slice_columns
    for start in range(first, tl.minimum(first + slice_columns, K), COLUMNS):
        left = numbers_tile(
            codes, scales, factors, mean, levels, found, start, K, TOGETHER, EVEN, COLUMNS, x.dtype.element_ty
        )
        right = inner_tile(x, there, start + tl.arange(0, COLUMNS), x_stride, K, EVEN)
        total = tl.dot(left, tl.trans(right), total, input_precision=PRECISION)
    if HAS_BIAS:
        total += tl.load(bias + outputs, mask=outputs < N, other=0.0).to(tl.float32)[:, None]
    mask = (rows[None, :] < M) & (outputs[:, None] < N)
    target = out + part.to(tl.int64) * M * N + rows[None, :].to(tl.int64) * N + outputs[:, None]
    tl.store(target, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def input_gradient_kernel(
    grad, codes, scales, factors, mean, levels, low, a, out,
    grad_stride, low_stride, M, N, K, R, slice_outputs,
    TOGETHER: tl.constexpr, EVEN: tl.constexpr, WHOLE: tl.constexpr, ADDS: tl.constexpr,
    PRECISION: tl.constexpr, GROUP: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Out = low A + dy W of one slice of the outputs, and with ADDS what it held; WHOLE: BLOCK_N divides the outputs.

    The first slice has the update, which begins its sum.
    """
    tile_m, tile_k = place(M, K, BLOCK_M, COLUMNS, GROUP)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_k * COLUMNS + tl.arange(0, COLUMNS)
    part = tl.program_id(1)
    total = tl.zeros([BLOCK_M, COLUMNS], dtype=tl.float32)
    for start in range(0, tl.where(part == 0, R, 0), BLOCK_R):
        ranks = start + tl.arange(0, BLOCK_R)
        left = tile(low, rows, ranks, low_stride, M, R)
        total = tl.dot(left, tile(a, ranks, columns, K, R, K), total, input_precision=PRECISION)
    there = rows % M
    first = part * slice_outputs
    for start in range(first, tl.minimum(first + slice_outputs, N), BLOCK_N):
        outputs = start + tl.arange(0, BLOCK_N)
        # Zero beyond the last output, where the numbers begin anew.
        left = inner_tile(grad, there, outputs, grad_stride, N, WHOLE)
        right = numbers_tile(
            codes, scales, factors, mean, levels, outputs % N, tile_k * COLUMNS, K,
            TOGETHER, EVEN, COLUMNS, grad.dtype.element_ty,
        )  # fmt: skip
        total = tl.dot(left, right, total, input_precision=PRECISION)
    mask = (rows[:, None] < M) & (columns[None, :] < K)
    target = out + part.to(tl.int64) * M * K + rows[:, None].to(tl.int64) * K + columns[None, :]
    if ADDS:
        total += tl.load(target, mask=mask, other=0.0).to(tl.float32)
    tl.store(target, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def finish_kernel(
    slices, bias, out, count, size, N,
    HAS_BIAS: tl.constexpr, ADDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Out [M, N] = the sum of the slices, in their order, + bias, and with ADDS what it held, rounded once."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = places < size
    total = tl.zeros([BLOCK], dtype=tl.float32)
    part = slices + places
    for _ in range(count):
        total += tl.load(part, mask=mask, other=0.0)
        part += size
    if HAS_BIAS:
        total += tl.load(bias + places % N, mask=mask, other=0.0).to(tl.float32)
    if ADDS:
        total += tl.load(out + places, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + places, total.to(out.dtype.element_ty), mask=mask)
