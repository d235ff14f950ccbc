"""`rope` in Triton. Shape suffixes: T tokens, H heads, D head size, R turned elements."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from luthier.kernels.gpu import Launch, covering, enqueue
from luthier.kernels.operands import heads_of
from luthier.kernels.rope.cpu import rope_op


@triton.jit
def rope_kernel(
    x, cos, sin, out, token_stride, head_stride, H, D, R,
    TRANSPOSED: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """One token: the two halves of the first R elements of each head turned against each other, the rest copied."""
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    half = R // 2
    columns = tl.arange(0, BLOCK_R)
    angles = token * R + columns
    mask = columns < half
    cos_low = tl.load(cos + angles, mask=mask, other=0.0).to(tl.float32)[None, :]
    cos_high = tl.load(cos + angles + half, mask=mask, other=0.0).to(tl.float32)[None, :]
    sin_low = tl.load(sin + angles, mask=mask, other=0.0).to(tl.float32)[None, :]
    sin_high = tl.load(sin + angles + half, mask=mask, other=0.0).to(tl.float32)[None, :]
    mask = (heads[:, None] < H) & mask[None, :]
    source = x + token * token_stride + heads[:, None] * head_stride + columns[None, :]
    target = out + (token * H + heads[:, None]) * D + columns[None, :]
    low = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    high = tl.load(source + half, mask=mask, other=0.0).to(tl.float32)
    if TRANSPOSED:
        turned_low = low * cos_low + high * sin_high
        turned_high = high * cos_high - low * sin_low
    else:
        turned_low = low * cos_low - high * sin_low
        turned_high = high * cos_high + low * sin_high
    tl.store(target, turned_low.to(out.dtype.element_ty), mask=mask)
    tl.store(target + half, turned_high.to(out.dtype.element_ty), mask=mask)
    if BLOCK_REST > 0:
        rest = R + tl.arange(0, BLOCK_REST)
        mask = (heads[:, None] < H) & (rest[None, :] < D)
        source = x + token * token_stride + heads[:, None] * head_stride + rest[None, :]
        target = out + (token * H + heads[:, None]) * D + rest[None, :]
        tl.store(target, tl.load(source, mask=mask, other=0.0), mask=mask)


@functools.cache
def launch_of(num_heads: int, head_dim: int, rotary: int) -> Launch:
    """As many heads to a program as make 2,048 elements, at most all."""
    rest = covering(head_dim - rotary) if rotary < head_dim else 0
    heads = min(covering(num_heads), max(1, 2048 // covering(head_dim)))
    return Launch(
        tiles={"BLOCK_H": heads, "BLOCK_R": covering(rotary // 2), "BLOCK_REST": rest}, num_stages=1
    )


@rope_op.on_gpu
def rope_triton(x_THD: Tensor, cos_TR: Tensor, sin_TR: Tensor, transposed: bool) -> Tensor:
    """X turned by its token's angles; `transposed` applies the gradient's map instead."""
    x_THD, cos_TR, sin_TR = heads_of(x_THD), cos_TR.contiguous(), sin_TR.contiguous()
    out_THD = torch.empty(x_THD.shape, dtype=x_THD.dtype, device=x_THD.device)
    (T, H, D), R = x_THD.shape, cos_TR.shape[1]
    launch = launch_of(H, D, R)
    if out_THD.numel():
        operands = x_THD, cos_TR, sin_TR, out_THD, x_THD.stride(0), x_THD.stride(1), H, D, R
        grid = T, triton.cdiv(H, launch.tiles["BLOCK_H"])
        enqueue(rope_kernel, grid, operands, {"TRANSPOSED": transposed}, launch)
    return out_THD
