"""The LoRA linear ops in Triton: x A^T once for all projections, the update in the accumulator of each product.

Nothing is added up by atomics: sums over rows are formed in slices, which are then added in order.

Shape suffixes: M rows, K inputs, N outputs, R rank, Q the ranks of all projections together, P slices of the rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from luthier.kernels.gpu import Launch, Launches, covering, launch_for, precision, threshold
from luthier.kernels.lora_linear import MAX_TRITON_PROJECTIONS
from luthier.kernels.lora_linear.cpu import lora_linear_backward_op, lora_linear_op
from luthier.kernels.operands import rows_of
from luthier.kernels.tiles import kept_tile, place, tile, turned_tile

SHRINK: Launches = {
    "*": Launch(tiles={"BLOCK_M": 64, "BLOCK_K": 64}, num_warps=4, num_stages=3),
    "gfx942": Launch(tiles={"BLOCK_M": 64, "BLOCK_K": 64}, num_warps=4, num_stages=2),
}
EXPAND: Launches = {
    "*": Launch(tiles={"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32}, num_warps=8, num_stages=3),
    "sm_80": Launch(tiles={"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64}, num_warps=8, num_stages=3),
    "sm_90": Launch(tiles={"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64}, num_warps=8, num_stages=3),
    "sm_100": Launch(tiles={"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64}, num_warps=8, num_stages=3),
    "gfx942": Launch(tiles={"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64}, num_warps=8, num_stages=2),
}
RANK_GRADIENTS: Launches = {
    "*": Launch(tiles={"BLOCK_M": 256, "BLOCK_N": 32}, num_warps=8, num_stages=2),
    # Each wave holds all of a tile's S: with more waves or stages, 256 rows of rank 64 do not fit its registers.
    "gfx942": Launch(tiles={"BLOCK_M": 256, "BLOCK_N": 64}, num_warps=4, num_stages=1),
}
INPUT_GRADIENT: Launches = EXPAND
# The random words of a tile take registers.
DROPPED_INPUT_GRADIENT: Launches = {
    **EXPAND,
    "sm_90": Launch(tiles={"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64}, num_warps=8, num_stages=3),
    "sm_100": Launch(tiles={"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64}, num_warps=8, num_stages=3),
}
GRAM: Launches = {"*": Launch(tiles={"BLOCK_M": 64, "BLOCK_N": 64}, num_warps=4, num_stages=3)}
_GRAM_SLICES = 8
_GROUP_ROWS = 8
# Specialising on these would compile a kernel anew for a seed that is divisible by 16, or a stream of 1.
_COUNTERS = ["seed", "stream", "row0", "threshold", "keep_scale"]


@triton.jit(do_not_specialize=_COUNTERS)
def shrink_kernel(
    x, a, s, x_stride, M, K, Q,
    seed, stream, row0, threshold, keep_scale,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """S = dropped(x) A^T: one tile of rows, all ranks of a block."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    ranks = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    total = tl.zeros([BLOCK_M, BLOCK_Q], dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        left = tile(x, rows, columns, x_stride, M, K)
        if DROPOUT:
            kept = kept_tile(
                tl.program_id(0) * BLOCK_M, start, row0, seed, stream, threshold, BLOCK_M, BLOCK_K
            )
            left = tl.where(kept, left.to(tl.float32) * keep_scale, 0.0).to(x.dtype.element_ty)
        right = turned_tile(a, ranks, columns, K, Q, K)
        total = tl.dot(left, right, total, input_precision=PRECISION)
    mask = (rows[:, None] < M) & (ranks[None, :] < Q)
    tl.store(s + rows[:, None].to(tl.int64) * Q + ranks[None, :], total.to(s.dtype.element_ty), mask=mask)


@triton.jit
def expand_kernel(
    x, weight, bias, s, b, y, x_stride, weight_stride, s_stride, M, N, K, R,
    HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Y = S B^T + x W^T + bias, B already scaled: the update begins the accumulator."""
    tile_m, tile_n = place(M, N, BLOCK_M, BLOCK_N, GROUP)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    outputs = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(0, R, BLOCK_R):
        ranks = start + tl.arange(0, BLOCK_R)
        left = tile(s, rows, ranks, s_stride, M, R)
        total = tl.dot(left, turned_tile(b, outputs, ranks, R, N, R), total, input_precision=PRECISION)
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
def rank_gradients_kernel(
    grad, s, b, ds, slices, grad_stride, s_stride, ds_stride, M, N, R,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """In one pass over a slice of dy: dS = dy B, and this slice's part of dy^T S; B is already scaled."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    ranks = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    low = tile(s, rows, ranks, s_stride, M, R)
    total = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
    part = slices + tl.program_id(0).to(tl.int64) * N * R + ranks[None, :] * N
    for start in range(0, N, BLOCK_N):
        outputs = start + tl.arange(0, BLOCK_N)
        right = tile(b, outputs, ranks, R, N, R)
        left = tile(grad, rows, outputs, grad_stride, M, N)
        total = tl.dot(left, right, total, input_precision=PRECISION)
        found = tl.dot(tl.trans(left), low, input_precision=PRECISION)
        mask = (outputs[:, None] < N) & (ranks[None, :] < R)
        tl.store(part + outputs[:, None], found, mask=mask)
    mask = (rows[:, None] < M) & (ranks[None, :] < R)
    target = ds + rows[:, None].to(tl.int64) * ds_stride + ranks[None, :]
    tl.store(target, total.to(ds.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_COUNTERS)
def input_gradient_kernel(
    grad0, grad1, grad2, weight0, weight1, weight2, ds, a, dx,
    stride0, stride1, stride2, turn0, turn1, turn2, M, K, Q, N0, N1, N2,
    seed, stream, row0, threshold, keep_scale,
    COUNT: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Dx = undropped(dS A) + the sum of dy W over COUNT projections; BLOCK_K outputs are contracted at a time."""
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
    for start in range(0, N0, BLOCK_K):
        outputs = start + tl.arange(0, BLOCK_K)
        left = tile(grad0, rows, outputs, stride0, M, N0)
        right = tile(weight0, outputs, columns, turn0, N0, K)
        total = tl.dot(left, right, total, input_precision=PRECISION)
    if COUNT > 1:
        for start in range(0, N1, BLOCK_K):
            outputs = start + tl.arange(0, BLOCK_K)
            left = tile(grad1, rows, outputs, stride1, M, N1)
            right = tile(weight1, outputs, columns, turn1, N1, K)
            total = tl.dot(left, right, total, input_precision=PRECISION)
    if COUNT > 2:
        for start in range(0, N2, BLOCK_K):
            outputs = start + tl.arange(0, BLOCK_K)
            left = tile(grad2, rows, outputs, stride2, M, N2)
            right = tile(weight2, outputs, columns, turn2, N2, K)
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
def sum_slices_kernel(slices, out, count, size, scale, BLOCK: tl.constexpr):
    """Out = scale * the sum of the slices, in their order."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    part = slices + places
    for _ in range(count):
        total += tl.load(part, mask=places < size, other=0.0)
        part += size
    tl.store(out + places, total * scale, mask=places < size)


_Dropout = tuple[float, list[int]]


def _counters(dropout: _Dropout) -> tuple[int, int, int, int, float]:
    """(seed, stream, row0, threshold, 1 / (1 - probability)) as the kernels take them."""
    probability, (seed, stream, row0) = dropout
    return seed, stream, row0, threshold(probability), 1 / (1 - probability)


def _shrink(x_MK: Tensor, a_QK: Tensor, dropout: _Dropout) -> Tensor:
    launch = launch_for(SHRINK, x_MK.device)
    M, K = x_MK.shape
    Q = a_QK.shape[0]
    s_MQ = torch.empty(M, Q, dtype=x_MK.dtype, device=x_MK.device)
    block = min(128, covering(Q, 16))
    grid = (triton.cdiv(M, launch.tiles["BLOCK_M"]), triton.cdiv(Q, block))
    if M:
        shrink_kernel[grid](
            x_MK, a_QK, s_MQ, x_MK.stride(0), M, K, Q, *_counters(dropout),
            DROPOUT=dropout[0] > 0, PRECISION=precision(x_MK), BLOCK_Q=block, **launch.options,
        )  # fmt: skip
    return s_MQ


@lora_linear_op.on_gpu
def lora_linear_triton(
    x_MK: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    factors: list[Tensor],
    numbers: list[float],
    key: list[int],
) -> list[Tensor]:
    """[y of each projection..., S [M, Q]], as the C++ kernel."""
    x_MK = rows_of(x_MK)
    count = len(weights)
    M, K = x_MK.shape
    a_QK = torch.cat([a.to(x_MK.dtype) for a in factors[:count]])
    s_MQ = _shrink(x_MK, a_QK, (numbers[-1], key))
    launch = launch_for(EXPAND, x_MK.device)
    outputs = []
    start = 0
    for given, bias, b_NR, scale in zip(weights, biases, factors[count:], numbers[:-1], strict=True):
        weight, (N, R) = rows_of(given), b_NR.shape
        scaled_NR = (b_NR * scale).to(x_MK.dtype).contiguous()
        y_MN = torch.empty(M, N, dtype=x_MK.dtype, device=x_MK.device)
        grid = (triton.cdiv(M, launch.tiles["BLOCK_M"]) * triton.cdiv(N, launch.tiles["BLOCK_N"]),)
        if M:
            expand_kernel[grid](
                x_MK, weight, bias.contiguous(), s_MQ[:, start:], scaled_NR, y_MN,
                x_MK.stride(0), weight.stride(0), s_MQ.stride(0), M, N, K, R,
                HAS_BIAS=bias.numel() > 0, PRECISION=precision(x_MK), GROUP=_GROUP_ROWS,
                BLOCK_R=min(64, covering(R, 16)), **launch.options,
            )  # fmt: skip
        outputs.append(y_MN)
        start += R
    return [*outputs, s_MQ]


@lora_linear_backward_op.on_gpu
def lora_linear_backward_triton(
    grads: list[Tensor],
    saved: list[Tensor],
    weights: list[Tensor],
    factors: list[Tensor],
    numbers: list[float],
    key: list[int],
    needs: list[bool],
) -> list[Tensor]:
    """[dx, dbias..., dA..., dB...], as the C++ kernel; each dB the transpose of what is row-major."""
    x_MK, s_MQ, grads = rows_of(saved[0]), saved[1], [rows_of(grad) for grad in grads]
    count, dropout = len(weights), (numbers[-1], key)
    ds_MQ = torch.empty_like(s_MQ)
    grads_b = []
    start = 0
    for grad, b_NR, scale in zip(grads, factors[count:], numbers[:-1], strict=True):
        end = start + b_NR.shape[1]
        grads_b.append(_rank_gradients(grad, s_MQ[:, start:end], b_NR, scale, ds_MQ[:, start:end]))
        start = end
    ranks = [a.shape[0] for a in factors[:count]]
    grads_a = [part.clone() for part in torch.split(_gram(ds_MQ, x_MK, dropout), ranks)]
    biases = [
        grad.sum(dim=0, dtype=torch.float32).to(grad.dtype) if need else grad.new_empty(0)
        for grad, need in zip(grads, needs[1:], strict=True)
    ]
    a_QK = torch.cat([a.to(x_MK.dtype) for a in factors[:count]])
    dx_MK = _input_gradient(grads, ds_MQ, weights, a_QK, dropout) if needs[0] else x_MK.new_empty(0)
    return [dx_MK, *biases, *grads_a, *grads_b]


def _rank_gradients(grad: Tensor, s_MR: Tensor, b_NR: Tensor, scale: float, ds_MR: Tensor) -> Tensor:
    """Write dS into `ds_MR` and return dB, float32."""
    launch = launch_for(RANK_GRADIENTS, grad.device)
    (M, N), R = grad.shape, s_MR.shape[1]
    slices = triton.cdiv(M, launch.tiles["BLOCK_M"])
    parts_PRN = torch.empty(slices, R, N, dtype=torch.float32, device=grad.device)
    block = min(64, covering(R, 16))
    if M:
        rank_gradients_kernel[(slices, triton.cdiv(R, block))](
            grad, s_MR, (b_NR * scale).to(grad.dtype).contiguous(), ds_MR, parts_PRN,
            grad.stride(0), s_MR.stride(0), ds_MR.stride(0), M, N, R,
            PRECISION=precision(grad), BLOCK_R=block, **launch.options,
        )  # fmt: skip
    return _sum_slices(parts_PRN, scale).T


def _gram(low_MQ: Tensor, x_MK: Tensor, dropout: _Dropout) -> Tensor:
    """low^T dropped(x), float32 [Q, K]."""
    launch = launch_for(GRAM, x_MK.device)
    (M, K), Q = x_MK.shape, low_MQ.shape[1]
    rows = launch.tiles["BLOCK_M"]
    slice_rows = max(rows, triton.cdiv(triton.cdiv(M, _GRAM_SLICES), rows) * rows)
    slices = triton.cdiv(M, slice_rows)
    parts_PQK = torch.empty(slices, Q, K, dtype=torch.float32, device=x_MK.device)
    block = min(128, covering(Q, 16))
    if M:
        gram_kernel[(triton.cdiv(K, launch.tiles["BLOCK_N"]), triton.cdiv(Q, block), slices)](
            low_MQ, x_MK, parts_PQK, low_MQ.stride(0), x_MK.stride(0), M, Q, K, slice_rows,
            *_counters(dropout), DROPOUT=dropout[0] > 0, PRECISION=precision(x_MK), BLOCK_Q=block,
            **launch.options,
        )  # fmt: skip
    return _sum_slices(parts_PQK, 1.0)


def _sum_slices(parts: Tensor, scale: float) -> Tensor:
    """Scale times the sum over the first dimension, in its order."""
    out = torch.empty(parts.shape[1:], dtype=torch.float32, device=parts.device)
    if out.numel():
        grid = (triton.cdiv(out.numel(), 1024),)
        sum_slices_kernel[grid](parts, out, parts.shape[0], out.numel(), scale, BLOCK=1024)
    return out


def _input_gradient(
    grads: list[Tensor], ds_MQ: Tensor, weights: list[Tensor], a_QK: Tensor, dropout: _Dropout
) -> Tensor:
    table = DROPPED_INPUT_GRADIENT if dropout[0] else INPUT_GRADIENT
    launch = launch_for(table, ds_MQ.device)
    M, (Q, K) = ds_MQ.shape[0], a_QK.shape
    dx_MK = torch.empty(M, K, dtype=ds_MQ.dtype, device=ds_MQ.device)
    # Places of projections that are not there hold the first one; the kernel does not look at them.
    dy = [*grads, *[grads[0]] * (MAX_TRITON_PROJECTIONS - len(grads))]
    rows = [rows_of(weight) for weight in weights]
    rows += [rows[0]] * (MAX_TRITON_PROJECTIONS - len(rows))
    grid = (triton.cdiv(M, launch.tiles["BLOCK_M"]) * triton.cdiv(K, launch.tiles["BLOCK_N"]),)
    if M:
        input_gradient_kernel[grid](
            *dy, *rows, ds_MQ, a_QK, dx_MK,
            *(one.stride(0) for one in dy), *(one.stride(0) for one in rows), M, K, Q,
            *(one.shape[0] for one in rows), *_counters(dropout),
            COUNT=len(grads), DROPOUT=dropout[0] > 0, PRECISION=precision(ds_MQ), GROUP=_GROUP_ROWS,
            BLOCK_R=min(64, covering(Q, 16)), **launch.options,
        )  # fmt: skip
    return dx_MK
