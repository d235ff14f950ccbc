"""The LoRA linear ops on GPUs: x A^T once for all projections, the update in the accumulator of each large product.

The thin products, of x or dy with low-rank rows, are the vendor library's, which no kernel of ours beat by enough; with
dropout, of which it knows nothing, or where it would round what is to be float32, they are ours. The products with the
frozen weights are ours where a measurement says that they win (`Fused`), and for dx with dropout, whose mask stands
between the update and the sum; else the library's, with the update as one more of its products that adds to the result.

Shape suffixes: M rows, K inputs, N outputs, R rank, Q the ranks of all projections together, P slices of the rows.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from luthier.kernels.dequantise import codes_refusal, dense, is_quantised
from luthier.kernels.dequantise.triton import packed_gradient, packed_product
from luthier.kernels.gpu import (
    architecture,
    covering,
    enqueue,
    gives_float32,
    interpreted,
    launch_for,
    precision,
    product_float32,
    slice_height,
    threshold,
)
from luthier.kernels.linear import reads_codes
from luthier.kernels.lora_linear import MAX_TRITON_PROJECTIONS
from luthier.kernels.lora_linear.cpu import lora_linear_backward_op, lora_linear_op
from luthier.kernels.lora_linear.factors import layout_of, rounded_parts, shapes_of
from luthier.kernels.lora_linear.triton_kernels import (
    DROPPED_INPUT_GRADIENT,
    EXPAND,
    GRAM,
    INPUT_GRADIENT,
    ROUND,
    SHRINK,
    SUM,
    expand_kernel,
    gram_kernel,
    input_gradient_kernel,
    round_kernel,
    shrink_kernel,
    sum_slices_kernel,
)
from luthier.kernels.operands import rows_of

_GROUP_ROWS = 8
# What a tensor descriptor asks of addresses and distances of rows.
_DESCRIPTOR_BYTES = 16

_Dropout = tuple[float, list[int]]
_KEEP: _Dropout = (0.0, [0, 0, 0])


@dataclass(frozen=True, slots=True, kw_only=True)
class Fused:
    """Where our product of a frozen weight, with the update in its accumulator, beats the library's two.

    Attributes:
        least: multiplications from which on it does: below, the launch is what takes time.
        most_inner: the longest contraction; in a longer one the update weighs nothing.
    """

    least: float
    most_inner: float = math.inf


FORWARD: Mapping[str, Fused] = {"sm_90": Fused(least=2**36)}
BACKWARD: Mapping[str, Fused] = {"sm_90": Fused(least=2**34, most_inner=8192)}
"""Measured on an H100 in bfloat16, for its architecture; one that is not here takes the library, as other types do."""


def _is_fused(table: Mapping[str, Fused], x: Tensor, products: int, inner: int) -> bool:
    if interpreted():
        return True
    if x.dtype != torch.bfloat16:
        return False
    limits = table.get(architecture(x.device))
    return limits is not None and products >= limits.least and inner <= limits.most_inner


def _is_packed(x: Tensor, weights: list[Tensor]) -> bool:
    """Whether products of so many rows as x read the codes of these weights."""
    if not all(is_quantised(weight) for weight in weights):
        return False
    if interpreted():
        return all(codes_refusal("triton", weight, weight.shape[1]) is None for weight in weights)
    return all(reads_codes(x, weight) for weight in weights)


def _counters(dropout: _Dropout) -> tuple[int, int, int, int, float]:
    """(seed, stream, row0, threshold, 1 / (1 - probability)) as the kernels take them."""
    probability, (seed, stream, row0) = dropout
    return seed, stream, row0, threshold(probability), 1 / (1 - probability)


def _rounded(factors: list[Tensor], scales: list[float], dtype: torch.dtype) -> Tensor:
    """All A, and each B times its scale, rounded; where they stand is in `factors.py`."""
    count = len(scales)
    shapes = shapes_of(factors)
    out = torch.empty(layout_of(shapes).total, dtype=dtype, device=factors[0].device)
    held = [factor.contiguous() for factor in factors]
    unused = MAX_TRITON_PROJECTIONS - count
    tensors = [*held[:count], *held[:1] * unused, *held[count:], *held[:1] * unused, out]
    numbers, grid = _rounding(shapes)
    enqueue(round_kernel, grid, (*tensors, *numbers, *scales, *[1.0] * unused), {"COUNT": count}, ROUND)
    return out


@functools.cache
def _rounding(shapes: tuple[torch.Size, ...]) -> tuple[tuple[int, ...], tuple[int, int]]:
    """(Sizes and places, as `round_kernel` takes them, grid)."""
    layout, count = layout_of(shapes), len(shapes) // 2
    room = [0] * (MAX_TRITON_PROJECTIONS - count)

    def padded(of: tuple[int, ...]) -> list[int]:
        """For the most projections that there can be, of A and of B."""
        return [*of[:count], *room, *of[count:], *room]

    grid = triton.cdiv(max(layout.sizes), ROUND.tiles["BLOCK"]), 2 * count
    return (*padded(layout.sizes), *padded(layout.places)[1:]), grid


def _shrink(x_MK: Tensor, a_QK: Tensor, dropout: _Dropout) -> Tensor:
    """dropped(x) A^T [M, Q]."""
    if dropout[0] == 0:
        return x_MK @ a_QK.T
    launch = launch_for(SHRINK, x_MK)
    (M, K), Q = x_MK.shape, a_QK.shape[0]
    s_MQ = torch.empty(M, Q, dtype=x_MK.dtype, device=x_MK.device)
    block = min(128, covering(Q, 16))
    if M:
        enqueue(
            shrink_kernel,
            (triton.cdiv(M, launch.tiles["BLOCK_M"]), triton.cdiv(Q, block)),
            (x_MK, a_QK, s_MQ, x_MK.stride(0), Q, M, K, Q, *_counters(dropout)),
            {"PRECISION": precision(x_MK), "BLOCK_Q": block},
            launch,
        )
    return s_MQ


@lora_linear_op.on_gpu_with_codes
def lora_linear_triton(
    x_MK: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    factors: list[Tensor],
    numbers: list[float],
    key: list[int],
) -> list[Tensor]:
    """[y of each projection..., S [M, Q], rounded factors], as the C++ kernel."""
    x_MK = rows_of(x_MK)
    rounded = _rounded(factors, numbers[:-1], x_MK.dtype)
    a_QK, scaled = rounded_parts(rounded, factors)
    s_MQ = _shrink(x_MK, a_QK, (numbers[-1], key))
    outputs = []
    first = 0
    for weight, bias, b_NR in zip(weights, biases, scaled, strict=True):
        low = s_MQ[:, first : first + b_NR.shape[1]]
        first += b_NR.shape[1]
        outputs.append(_projected(x_MK, weight, bias if bias.numel() else None, (low, b_NR)))
    return [*outputs, s_MQ, rounded]


def _projected(
    x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None, update: tuple[Tensor, Tensor]
) -> Tensor:
    """X W^T + bias + S B^T, of the update (S, B)."""
    if _is_packed(x_MK, [weight_NK]):
        return packed_product(x_MK, weight_NK, bias_N, update)
    weight_NK = dense(weight_NK)
    low_MR, b_NR = update
    (M, K), N = x_MK.shape, weight_NK.shape[0]
    if not (_is_fused(FORWARD, x_MK, M * N * K, K) and M and _described(x_MK, weight_NK, N)):
        return torch.nn.functional.linear(x_MK, weight_NK, bias_N).addmm_(low_MR, b_NR.T)
    launch = launch_for(EXPAND, x_MK)
    block_m, block_n, block_k = (launch.tiles[f"BLOCK_{name}"] for name in "MNK")
    y_MN = torch.empty(M, N, dtype=x_MK.dtype, device=x_MK.device)
    programs = _programs(x_MK.device)
    tiles = triton.cdiv(M, block_m) * triton.cdiv(N, block_n)
    R = b_NR.shape[1]
    enqueue(
        expand_kernel,
        (min(programs, tiles),),
        (
            TensorDescriptor.from_tensor(x_MK, [block_m, block_k]),
            TensorDescriptor.from_tensor(weight_NK, [block_n, block_k]),
            TensorDescriptor.from_tensor(y_MN, [block_m, block_n // 2]),
            *(low_MR, b_NR, low_MR if bias_N is None else bias_N.contiguous()),
            *(low_MR.stride(0), M, N, K, R),
        ),
        {
            "HAS_BIAS": bias_N is not None,
            "PROGRAMS": programs,
            "GROUP": _GROUP_ROWS,
            "BLOCK_R": min(64, covering(R, 16)),
        },
        launch,
    )
    return y_MN


def _described(x_MK: Tensor, weight_NK: Tensor, N: int) -> bool:
    """Tell whether tensor descriptors can be made of x, the weight and y."""
    item = x_MK.element_size()
    if item != 2 or N * item % _DESCRIPTOR_BYTES:
        return False
    return all(
        one.stride(1) == 1
        and one.stride(0) * item % _DESCRIPTOR_BYTES == 0
        and one.data_ptr() % _DESCRIPTOR_BYTES == 0
        for one in (x_MK, weight_NK)
    )


@functools.cache
def _programs(device: torch.device) -> int:
    """As many as the device runs at once."""
    return 4 if interpreted() else torch.cuda.get_device_properties(device).multi_processor_count


@lora_linear_backward_op.on_gpu_with_codes
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
    a_QK, scaled = rounded_parts(saved[2], factors)
    dropout = numbers[-1], key
    ds_MQ = torch.empty_like(s_MQ)
    grads_b = []
    first = 0
    for grad, b_NR, scale in zip(grads, scaled, numbers[:-1], strict=True):
        own = slice(first, first + b_NR.shape[1])
        first = own.stop
        torch.mm(grad, b_NR, out=ds_MQ[:, own])
        found_RN = _gram(s_MQ[:, own], grad, _KEEP)
        grads_b.append((found_RN if scale == 1 else found_RN.mul_(scale)).T)
    found_QK = _gram(ds_MQ, x_MK, dropout)
    ranks = [b_NR.shape[1] for b_NR in scaled]
    grads_a = [found_QK] if len(ranks) == 1 else [part.clone() for part in found_QK.split(ranks)]
    biases = [
        grad.sum(dim=0, dtype=torch.float32).to(grad.dtype) if need else grad.new_empty(0)
        for grad, need in zip(grads, needs[1:], strict=True)
    ]
    dx_MK = _input_gradient(grads, ds_MQ, weights, a_QK, dropout) if needs[0] else x_MK.new_empty(0)
    return [dx_MK, *biases, *grads_a, *grads_b]


def _gram(low_MQ: Tensor, x_MK: Tensor, dropout: _Dropout) -> Tensor:
    """low^T dropped(x), float32 [Q, K]."""
    if dropout[0] == 0 and gives_float32(x_MK):
        return product_float32(low_MQ.T, x_MK)
    launch = launch_for(GRAM, x_MK)
    (M, K), Q = x_MK.shape, low_MQ.shape[1]
    block = min(128, covering(Q, 16))
    blocks = triton.cdiv(K, launch.tiles["BLOCK_N"]), triton.cdiv(Q, block)
    slice_rows = slice_height(M, blocks[0] * blocks[1], launch.tiles["BLOCK_M"])
    slices = triton.cdiv(M, slice_rows)
    parts_PQK = torch.empty(slices, Q, K, dtype=torch.float32, device=x_MK.device)
    if M:
        sizes = low_MQ.stride(0), x_MK.stride(0), M, Q, K, slice_rows
        enqueue(
            gram_kernel,
            (*blocks, slices),
            (low_MQ, x_MK, parts_PQK, *sizes, *_counters(dropout)),
            {"DROPOUT": dropout[0] > 0, "PRECISION": precision(x_MK), "BLOCK_Q": block},
            launch,
        )
    return parts_PQK[0] if slices == 1 else _sum_slices(parts_PQK)


def _sum_slices(parts: Tensor) -> Tensor:
    """The sum over the first dimension, in its order."""
    out = torch.empty(parts.shape[1:], dtype=torch.float32, device=parts.device)
    if size := out.numel():
        grid = (triton.cdiv(size, SUM.tiles["BLOCK"]),)
        enqueue(sum_slices_kernel, grid, (parts, out, parts.shape[0], size), {}, SUM)
    return out


def _input_gradient(
    grads: list[Tensor], ds_MQ: Tensor, weights: list[Tensor], a_QK: Tensor, dropout: _Dropout
) -> Tensor:
    if dropout[0] == 0 and _is_packed(ds_MQ, weights):
        dx_MK = packed_gradient(grads[0], weights[0], (ds_MQ, a_QK))
        for grad, weight in zip(grads[1:], weights[1:], strict=True):
            packed_gradient(grad, weight, addend_MK=dx_MK)
        return dx_MK
    weights = [dense(weight) for weight in weights]
    M, K, inner = ds_MQ.shape[0], a_QK.shape[1], sum(weight.shape[0] for weight in weights)
    if dropout[0] == 0 and not _is_fused(BACKWARD, ds_MQ, M * K * inner, inner):
        dx_MK = torch.mm(grads[0], weights[0])
        for grad, weight in zip(grads[1:], weights[1:], strict=True):
            dx_MK.addmm_(grad, weight)
        return dx_MK.addmm_(ds_MQ, a_QK)
    launch = launch_for(DROPPED_INPUT_GRADIENT if dropout[0] else INPUT_GRADIENT, ds_MQ)
    tiles, Q = launch.tiles, a_QK.shape[0]
    dx_MK = torch.empty(M, K, dtype=ds_MQ.dtype, device=ds_MQ.device)
    # Places of projections that are not there hold the first one; the kernel does not look at them.
    unused = MAX_TRITON_PROJECTIONS - len(grads)
    dy = [*grads, *[grads[0]] * unused]
    rows = [rows_of(weight) for weight in weights]
    rows += [rows[0]] * unused
    outputs = [one.shape[0] for one in rows]
    if M:
        strides = *(one.stride(0) for one in dy), *(one.stride(0) for one in rows)
        enqueue(
            input_gradient_kernel,
            (triton.cdiv(M, tiles["BLOCK_M"]) * triton.cdiv(K, tiles["BLOCK_N"]),),
            (*dy, *rows, ds_MQ, a_QK, dx_MK, *strides, M, K, Q, *outputs, *_counters(dropout)),
            {
                "COUNT": len(grads),
                "DROPOUT": dropout[0] > 0,
                "EVEN": all(size % tiles["BLOCK_K"] == 0 for size in outputs),
                "PRECISION": precision(ds_MQ),
                "GROUP": _GROUP_ROWS,
                "BLOCK_R": min(64, covering(Q, 16)),
            },
            launch,
        )
    return dx_MK
