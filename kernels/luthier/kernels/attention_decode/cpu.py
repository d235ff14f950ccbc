"""`attention_decode` in C++. It changes caches in place and has no gradient, so that it is no torch op."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from luthier.kernels import _core
from luthier.kernels.attention_decode import Cached, NewTokens, Span
from luthier.kernels.operands import head_pointer, heads_of, settings


def attention_decode_cpu(
    new: NewTokens,
    caches: Sequence[Cached],
    spans: Sequence[Span],
    first: Sequence[int],
    options: tuple[float, float],
) -> Tensor:
    """Put into caches and attend -> [T, H, D]; `options` are scale and softcap."""
    heads = tuple(heads_of(one) for one in new[:3])
    angles = () if new.angles is None else tuple(one.contiguous() for one in new.angles)
    out_THD = torch.empty(new.query.shape, dtype=new.query.dtype, device="cpu")
    problem = problem_of(heads, out_THD, angles[0].shape[1] if angles else 0, options)
    if angles:
        problem |= {"cos": angles[0].data_ptr(), "sin": angles[1].data_ptr()}
    _core.attention_decode(problem, caches=layouts_of(caches, spans), first=first, **settings())
    return out_THD


def problem_of(
    heads: tuple[Tensor, ...], out: Tensor, rotary_dim: int, options: tuple[float, float]
) -> dict[str, Any]:
    """The C++ problem of query [T, H, D], key and value [T, G, D], without caches and angles."""
    query_THD, key_TGD, value_TGD = heads
    return {
        "query": head_pointer(query_THD),
        "key": head_pointer(key_TGD),
        "value": head_pointer(value_TGD),
        "out": out.data_ptr(),
        "cos": 0,
        "sin": 0,
        "num_tokens": len(query_THD),
        "num_heads": query_THD.shape[1],
        "num_key_heads": key_TGD.shape[1],
        "head_dim": query_THD.shape[2],
        "rotary_dim": rotary_dim,
        "scale": options[0],
        "softcap": options[1],
        "bfloat16": query_THD.dtype == torch.bfloat16,
    }


def layouts_of(caches: Sequence[Cached], spans: Sequence[Span]) -> list[tuple[int, ...]]:
    """Where caches lie, of each of which a span is new, for C++."""
    return [
        (*addresses, num_rows, capacity, begin, end - begin, num_prefix, *head, is_bfloat16)
        for (addresses, num_rows, capacity, num_prefix, head, is_bfloat16), (begin, end) in zip(
            (one.layout for one in caches), spans, strict=True
        )
    ]
