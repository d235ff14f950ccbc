"""`attention_varlen` in C++ as a torch custom op."""

from typing import Any

import torch
from torch import Tensor

from luthier.kernels import _core
from luthier.kernels.direct import kernel_op
from luthier.kernels.operands import head_pointer, heads_of, settings


@kernel_op("luthier::attention_varlen")
def attention_varlen_op(
    query_THD: Tensor,
    key_TGD: Tensor,
    value_TGD: Tensor,
    cu_seqlens: list[int],
    numbers: list[float],
    window: int,
) -> tuple[Tensor, Tensor]:
    """Output [T, H, D], and for backward float32 [H, T, 2]: each row's greatest score and sum of exponentials.

    `numbers` are the scale and the softcap.
    """
    T, H, D = query_THD.shape
    out_THD = torch.empty(T, H, D, dtype=query_THD.dtype, device="cpu")
    statistics_HT2 = torch.empty(H, T, 2, dtype=torch.float32, device="cpu")
    problem, _alive = _problem((query_THD, key_TGD, value_TGD), cu_seqlens, (numbers, window))
    problem |= {"out": head_pointer(out_THD), "statistics": statistics_HT2.data_ptr()}
    _core.attention(problem, **settings())
    return out_THD, statistics_HT2


def _problem(
    inputs: tuple[Tensor, Tensor, Tensor], cu_seqlens: list[int], options: tuple[list[float], int]
) -> tuple[dict[str, Any], tuple[Tensor, ...]]:
    """The C++ problem without its outputs, and the tensors whose memory it points to."""
    query, key, value = (heads_of(tensor) for tensor in inputs)
    bounds = torch.tensor(cu_seqlens, dtype=torch.int64, device="cpu")
    problem = {
        "query": head_pointer(query),
        "key": head_pointer(key),
        "value": head_pointer(value),
        "bounds": bounds.data_ptr(),
        "num_sequences": len(cu_seqlens) - 1,
        "num_heads": query.shape[1],
        "num_key_heads": key.shape[1],
        "head_dim": query.shape[2],
        "scale": options[0][0],
        "softcap": options[0][1],
        "window": options[1],
        "bfloat16": query.dtype == torch.bfloat16,
    }
    return problem, (query, key, value, bounds)


@attention_varlen_op.register_fake
def _(
    query_THD: Tensor,
    _key_TGD: Tensor,
    _value_TGD: Tensor,
    _cu_seqlens: list[int],
    _numbers: list[float],
    _window: int,
) -> tuple[Tensor, Tensor]:
    T, H, D = query_THD.shape
    return query_THD.new_empty(T, H, D), query_THD.new_empty(H, T, 2, dtype=torch.float32)


@kernel_op("luthier::attention_varlen_backward")
def attention_varlen_backward_op(
    grad_THD: Tensor,
    saved: list[Tensor],
    statistics_HT2: Tensor,
    cu_seqlens: list[int],
    numbers: list[float],
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value; `saved` are these three and the output."""
    query, key, value, out_THD = saved
    grad_THD, out_THD = heads_of(grad_THD), heads_of(out_THD)
    grads = [torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu") for tensor in saved[:3]]
    problem, _alive = _problem((query, key, value), cu_seqlens, (numbers, window))
    problem |= {"out": head_pointer(out_THD), "statistics": statistics_HT2.data_ptr()}
    _core.attention_gradient(
        problem,
        grad_out=head_pointer(grad_THD),
        grad_query=head_pointer(grads[0]),
        grad_key=head_pointer(grads[1]),
        grad_value=head_pointer(grads[2]),
        **settings(),
    )
    return grads[0], grads[1], grads[2]


@attention_varlen_backward_op.register_fake
def _(
    _grad_THD: Tensor,
    saved: list[Tensor],
    _statistics_HT2: Tensor,
    _cu_seqlens: list[int],
    _numbers: list[float],
    _window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = (tensor.new_empty(tensor.shape) for tensor in saved[:3])
    return query, key, value


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, *options = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(query, key, value, *output)
    ctx.options = options


def _backward(ctx: Any, grad_THD: Tensor, _grad_statistics: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value, out, statistics = ctx.saved_tensors
    grads = attention_varlen_backward_op(grad_THD, [query, key, value, out], statistics, *ctx.options)
    return (*grads, None, None, None)


attention_varlen_op.register_autograd(_backward, _keep)
