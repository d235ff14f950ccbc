"""`dequantise` in Triton, and products with quantised weights that read their codes, as the table of `linear` chooses.

Shape suffixes: M rows, K inputs, N outputs, R rank.
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from luthier.kernels.dequantise import FEW_ROWS
from luthier.kernels.dequantise.triton_kernels import (
    COLUMNS,
    FEW,
    FEW_GRADIENT,
    FINISH,
    MANY,
    MANY_GRADIENT,
    NUMBERS,
    finish_kernel,
    input_gradient_kernel,
    numbers_kernel,
    product_kernel,
)
from luthier.kernels.gpu import (
    Launch,
    Launches,
    covering,
    enqueue,
    launch_for,
    precision,
    slice_height,
)

_GROUP_ROWS = 8

Update = tuple[Tensor, Tensor]
"""(Rows [M, R], factor): B [N, R] of a product, A [R, K] of a gradient; both row-major, of the type of the rows."""


class Packed(NamedTuple):
    """A quantised weight as the kernels read it: nothing is made of it, and codes are copied only where rows have gaps.

    Attributes:
        tensors: codes, scales, and of NF4 the factors of scales, their mean and the levels; of INT8 the scales again.
        together: scales that share a factor; 0 of INT8.
    """

    tensors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
    together: int


def packed(weight_NK: Tensor) -> Packed:
    """The parts of one of torchao's tensors."""
    held: Any = weight_NK
    if hasattr(held, "quantized_data"):
        parts = (
            held.quantized_data,
            held.quantized_scalers,
            held.quantization_factor,
            held.scaler_mean,
            held.nf4,
        )
        return Packed(parts, held.scaler_block_size)
    scale = held.scale
    return Packed((held.qdata.contiguous(), scale, scale, scale, scale), 0)


@torch.no_grad()
def dequantise_triton(weight_NK: Tensor) -> Tensor:
    """The numbers [N, K] that a quantised weight stands for, in the type that it stands for."""
    tensors, together = packed(weight_NK)
    out_NK = torch.empty(weight_NK.shape, dtype=weight_NK.dtype, device=weight_NK.device)
    # Blocks of NF4 follow each other whatever the rows are.
    N, K = (out_NK.numel() // COLUMNS, COLUMNS) if together else out_NK.shape
    if out_NK.numel():
        enqueue(
            numbers_kernel,
            (triton.cdiv(N, NUMBERS.tiles["BLOCK_N"]), triton.cdiv(K, COLUMNS)),
            (*tensors, out_NK, N, K),
            {"TOGETHER": together, "EVEN": K % COLUMNS == 0, "COLUMNS": COLUMNS},
            NUMBERS,
        )
    return out_NK


def packed_product(
    x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None, update: Update | None = None
) -> Tensor:
    """X W^T + bias + the update's product [M, N], of codes; x is row-major."""
    (M, K), N = x_MK.shape, weight_NK.shape[0]
    y_MN = torch.empty(M, N, dtype=x_MK.dtype, device=x_MK.device)
    if M == 0:
        return y_MN
    tensors, together = packed(weight_NK)
    launch, block_m = _launch(x_MK, FEW, MANY)
    low, b_NR = update or (x_MK, x_MK)
    rank = b_NR.shape[1] if update else 0
    bias = None if bias_N is None else bias_N.contiguous()
    blocks = triton.cdiv(N, launch.tiles["BLOCK_N"])
    slice_columns = _slice(M, K, blocks, COLUMNS)
    slices = triton.cdiv(K, slice_columns)
    out = y_MN if slices == 1 else _parts(slices, y_MN)
    enqueue(
        product_kernel,
        (triton.cdiv(M, block_m) * blocks, slices),
        (
            *(x_MK, *tensors, low, b_NR, x_MK if bias is None else bias, out),
            *(x_MK.stride(0), low.stride(0), M, N, K, rank, slice_columns),
        ),
        {
            "EVEN": K % COLUMNS == 0,
            "HAS_BIAS": bias is not None and slices == 1,
            **_constants(x_MK, together, block_m, rank, launch),
        },
        launch,
    )
    if slices > 1:
        _finish(out, bias, y_MN, adds=False)
    return y_MN


def packed_gradient(
    grad_MN: Tensor, weight_NK: Tensor, update: Update | None = None, addend_MK: Tensor | None = None
) -> Tensor:
    """Dy W + the update's product + the addend [M, K], of codes, into the addend if there is one; dy is row-major."""
    (M, N), K = grad_MN.shape, weight_NK.shape[1]
    dx_MK = torch.empty(M, K, dtype=grad_MN.dtype, device=grad_MN.device) if addend_MK is None else addend_MK
    if M == 0:
        return dx_MK
    tensors, together = packed(weight_NK)
    launch, block_m = _launch(grad_MN, FEW_GRADIENT, MANY_GRADIENT)
    block_n = launch.tiles["BLOCK_N"]
    low, a_RK = update or (grad_MN, grad_MN)
    rank = a_RK.shape[0] if update else 0
    blocks = triton.cdiv(K, COLUMNS)
    slice_outputs = _slice(M, N, blocks, block_n)
    slices = triton.cdiv(N, slice_outputs)
    out = dx_MK if slices == 1 else _parts(slices, dx_MK)
    enqueue(
        input_gradient_kernel,
        (triton.cdiv(M, block_m) * blocks, slices),
        (
            *(grad_MN, *tensors, low, a_RK, out),
            *(grad_MN.stride(0), low.stride(0), M, N, K, rank, slice_outputs),
        ),
        {
            "EVEN": K % COLUMNS == 0,
            "WHOLE": N % block_n == 0,
            "ADDS": addend_MK is not None and slices == 1,
            **_constants(grad_MN, together, block_m, rank, launch),
        },
        launch,
    )
    if slices > 1:
        _finish(out, None, dx_MK, adds=addend_MK is not None)
    return dx_MK


def _launch(x: Tensor, few: Launches, many: Launches) -> tuple[Launch, int]:
    """(How it is launched, rows of a tile)."""
    if x.shape[0] <= FEW_ROWS:
        return launch_for(few, x), covering(x.shape[0], 16)
    launch = launch_for(many, x)
    return launch, launch.tiles["BLOCK_M"]


def _constants(x: Tensor, together: int, block_m: int, rank: int, launch: Launch) -> dict[str, int | str]:
    found: dict[str, int | str] = {
        "TOGETHER": together,
        "PRECISION": precision(x),
        "GROUP": _GROUP_ROWS,
        "COLUMNS": COLUMNS,
        "BLOCK_R": min(64, covering(rank, 16)),
    }
    return found if "BLOCK_M" in launch.tiles else {**found, "BLOCK_M": block_m}


def _slice(rows: int, inner: int, blocks: int, height: int) -> int:
    """How much of a contraction is a slice: all of it, unless there are few rows and so few programs.

    It does not depend on how few rows there are: a row's slices are the same beside any others. Tiles are not, so its
    bits within a slice are the compiler's and the device's.
    """
    return inner if rows > FEW_ROWS else slice_height(inner, blocks, height)


def _parts(slices: int, out: Tensor) -> Tensor:
    return torch.empty(slices, *out.shape, dtype=torch.float32, device=out.device)


def _finish(parts: Tensor, bias: Tensor | None, out: Tensor, *, adds: bool) -> None:
    size = out.numel()
    enqueue(
        finish_kernel,
        (triton.cdiv(size, FINISH.tiles["BLOCK"]),),
        (parts, out if bias is None else bias, out, parts.shape[0], size, out.shape[1]),
        {"HAS_BIAS": bias is not None, "ADDS": adds},
        FINISH,
    )
