"""The LoRA linear ops in C++ as torch custom ops.

A product with a low-rank update is one product with more contracted columns: [x, S] [W, sB]^T, and for the gradient
[dy, dS] [W; A]. S = x A^T is formed once for all projections that share x.

Shape suffixes: M rows, K inputs, N outputs, R rank, Q the ranks of all projections together.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from luthier.kernels import _core
from luthier.kernels.direct import kernel_op
from luthier.kernels.lora_linear.factors import layout, shapes_of
from luthier.kernels.lora_linear.reference import numbered
from luthier.kernels.operands import row_pointer, rows_of, settings
from luthier.kernels.products import Term, product


def _gram(left_MR: Tensor, right_MN: Tensor, scale: float = 1.0, *, transposed: bool = False) -> Tensor:
    """Scale * left^T right, float32 [R, N]; transposed, [N, R], row-major too."""
    shape = left_MR.shape[1], right_MN.shape[1]
    out = torch.empty(shape[::-1] if transposed else shape, dtype=torch.float32, device="cpu")
    problem = (
        *row_pointer(left_MR),
        *row_pointer(right_MN),
        left_MR.shape[0],
        *shape,
        scale,
        out.data_ptr(),
        transposed,
    )
    _core.gram(problems=[problem], bfloat16=left_MR.dtype == torch.bfloat16, **settings())
    return out


def dropped(x_MK: Tensor, probability: float, key: Sequence[int]) -> Tensor:
    """`reference.dropped` in C++; x itself where nothing is dropped."""
    if probability == 0:
        return x_MK
    out_MK = torch.empty_like(x_MK, memory_format=torch.contiguous_format)
    for first, end, row0 in numbered(x_MK.shape[0], key):
        x, out = x_MK[first:end], out_MK[first:end]
        problem = {
            "x": x.data_ptr(),
            "out": out.data_ptr(),
            "num_rows": end - first,
            "dim": x.shape[1],
            "x_stride": x.stride(0),
            "out_stride": out.stride(0),
            "seed": key[0],
            "stream": key[1],
            "row0": row0,
            "probability": probability,
            "bfloat16": x.dtype == torch.bfloat16,
        }
        _core.dropout(problem, **settings())
    return out_MK


@kernel_op("luthier::lora_linear")
def lora_linear_op(
    x_MK: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    factors: list[Tensor],
    numbers: list[float],
    key: list[int],
) -> list[Tensor]:
    """[y of each projection..., S [M, Q], rounded factors]; a bias of no elements is none. Weights are taken as frozen.

    `factors` are all A, then all B; `numbers` the scales, then the dropout's probability. Rounded factors are what
    `factors.layout_of` says, for Triton's backward pass; C++ rounds them again as it uses them, and gives none.
    """
    x_MK = rows_of(x_MK)
    count = len(weights)
    a_QK = torch.cat([a.to(x_MK.dtype) for a in factors[:count]])
    M, dtype = x_MK.shape[0], x_MK.dtype
    s_MQ = product(
        [(dropped(x_MK, numbers[-1], key), a_QK, True)],
        torch.empty(M, a_QK.shape[0], dtype=dtype, device="cpu"),
    )
    outputs = []
    start = 0
    for weight, bias, b_NR, scale in zip(weights, biases, factors[count:], numbers[:-1], strict=True):
        s_MR = s_MQ[:, start : start + b_NR.shape[1]]
        start += b_NR.shape[1]
        terms = [(x_MK, weight, True), (s_MR, (b_NR * scale).to(dtype), True)]
        bias_N = bias.contiguous() if bias.numel() else None
        outputs.append(product(terms, torch.empty(M, weight.shape[0], dtype=dtype, device="cpu"), bias_N))
    return [*outputs, s_MQ, x_MK.new_empty(0)]


@lora_linear_op.register_fake
def _(
    x_MK: Tensor,
    weights: list[Tensor],
    _biases: list[Tensor],
    factors: list[Tensor],
    _numbers: list[float],
    _key: list[int],
) -> list[Tensor]:
    rank = sum(a.shape[0] for a in factors[: len(weights)])
    widths = [weight.shape[0] for weight in weights]
    kept = layout(shapes_of(factors)).total if x_MK.device.type == "cuda" else 0
    return [*(x_MK.new_empty(x_MK.shape[0], width) for width in [*widths, rank]), x_MK.new_empty(kept)]


@kernel_op("luthier::lora_linear_backward")
def lora_linear_backward_op(
    grads: list[Tensor],
    saved: list[Tensor],
    weights: list[Tensor],
    factors: list[Tensor],
    numbers: list[float],
    key: list[int],
    needs: list[bool],
) -> list[Tensor]:
    """[dx, dbias..., dA..., dB...], the last two float32; `needs` says of dx and each dbias whether it is not empty.

    `saved` are x, S and the rounded factors.
    """
    x_MK, s_MQ, grads = rows_of(saved[0]), saved[1], [rows_of(grad) for grad in grads]
    count, dropout = len(weights), numbers[-1]
    M, dtype = x_MK.shape[0], x_MK.dtype
    ds_MQ = torch.empty_like(s_MQ)
    grads_b = []
    start = 0
    for grad, b_NR, scale in zip(grads, factors[count:], numbers[:-1], strict=True):
        end = start + b_NR.shape[1]
        product([(grad, (b_NR * scale).to(dtype), False)], ds_MQ[:, start:end])
        grads_b.append(_gram(s_MQ[:, start:end], grad, scale, transposed=True))
        start = end
    da_QK = _gram(ds_MQ, dropped(x_MK, dropout, key))
    parts = torch.split(da_QK, [a.shape[0] for a in factors[:count]])
    grads_a = [da_QK] if count == 1 else [part.clone() for part in parts]
    biases = [
        _gram(x_MK.new_ones(M, 1), grad)[0].to(dtype) if need else x_MK.new_empty(0)
        for grad, need in zip(grads, needs[1:], strict=True)
    ]
    dx_MK = (
        _input_gradient(grads, ds_MQ, weights, factors[:count], (dropout, key))
        if needs[0]
        else x_MK.new_empty(0)
    )
    return [dx_MK, *biases, *grads_a, *grads_b]


def _input_gradient(
    grads: list[Tensor],
    ds_MQ: Tensor,
    weights: list[Tensor],
    factors_a: list[Tensor],
    dropout: tuple[float, list[int]],
) -> Tensor:
    dtype = ds_MQ.dtype
    low: list[Term] = [(ds_MQ, torch.cat([a.to(dtype) for a in factors_a]), False)]
    base: list[Term] = [(grad, weight, False) for grad, weight in zip(grads, weights, strict=True)]
    dx_MK = torch.empty(ds_MQ.shape[0], weights[0].shape[1], dtype=dtype, device="cpu")
    if dropout[0] == 0:
        return product(low + base, dx_MK)
    addend_MK = dropped(product(low, torch.empty_like(dx_MK)), *dropout)
    return product(base, dx_MK, addend_MN=addend_MK)


@lora_linear_backward_op.register_fake
def _(
    grads: list[Tensor],
    saved: list[Tensor],
    _weights: list[Tensor],
    factors: list[Tensor],
    _numbers: list[float],
    _key: list[int],
    needs: list[bool],
) -> list[Tensor]:
    shapes = [saved[0].shape, *(grad.shape[1:] for grad in grads)]
    first = [saved[0].new_empty(shape if need else (0,)) for shape, need in zip(shapes, needs, strict=True)]
    grads_a = [a.new_empty(a.shape, dtype=torch.float32) for a in factors[: len(grads)]]
    grads_b = [fake_gradient_of_b(b) for b in factors[len(grads) :]]
    return [*first, *grads_a, *grads_b]


def fake_gradient_of_b(b_NR: Tensor) -> Tensor:
    """As the kernels give it: row-major by C++, by Triton the transpose of what is row-major."""
    if b_NR.device.type == "cpu":
        return b_NR.new_empty(b_NR.shape, dtype=torch.float32)
    return b_NR.new_empty(b_NR.shape[::-1], dtype=torch.float32).T


def _keep(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x_MK, weights, biases, factors, numbers, key = inputs
    if any(weight.requires_grad for weight in weights):
        raise ValueError("our kernels need frozen weights, got weight.requires_grad=True")
    ctx.save_for_backward(x_MK, *output[-2:], *weights, *factors)
    ctx.settings = (numbers, key)
    ctx.bias_needs = [bias.requires_grad for bias in biases]


def _backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    x_MK, s_MQ, rounded, *saved = ctx.saved_tensors
    count = len(saved) // 3
    weights, factors = saved[:count], saved[count:]
    dy = [_dense(grad, x_MK, weight) for grad, weight in zip(grads[:count], weights, strict=True)]
    needs = [ctx.needs_input_grad[0], *ctx.bias_needs]
    found = lora_linear_backward_op(dy, [x_MK, s_MQ, rounded], weights, factors, *ctx.settings, needs)
    firsts = [grad if need else None for grad, need in zip(found, needs, strict=False)]
    of_factors = [grad.to(factor.dtype) for grad, factor in zip(found[count + 1 :], factors, strict=True)]
    return firsts[0], [None] * count, firsts[1:], of_factors, None, None


def _dense(grad: Tensor | None, x_MK: Tensor, weight: Tensor) -> Tensor:
    """A gradient that autograd did not make, because nothing used the output, is zero."""
    return x_MK.new_zeros(x_MK.shape[0], weight.shape[0]) if grad is None else grad


lora_linear_op.register_autograd(_backward, _keep)
