"""Eager reference of `attention_varlen`, in plain torch: any float dtype and device, gradients by autograd.

Shape suffixes: T tokens, L tokens of a sequence, H query heads, G key/value heads, D head size.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn


def attention_varlen_reference(
    query_THD: Tensor,
    key_TGD: Tensor,
    value_TGD: Tensor,
    cu_seqlens: Sequence[int],
    scale: float,
    softcap: float = 0.0,
    window: int = 0,
) -> Tensor:
    """Causal attention of each sequence to itself -> [T, H, D]; memory: the scores of the longest sequence."""
    lengths = [end - start for start, end in pairwise(cu_seqlens)]
    if not lengths or cu_seqlens[-1] == 0:
        return query_THD * 0
    # One split has one gradient; a slice for each sequence would fill a gradient of the whole batch each.
    query, key, value = (
        torch.split(tensor.transpose(0, 1), lengths, dim=1) for tensor in (query_THD, key_TGD, value_TGD)
    )
    outputs = [
        _attend(query_HLD, key_GLD, value_GLD, (scale, softcap, window))
        for query_HLD, key_GLD, value_GLD in zip(query, key, value, strict=True)
    ]
    return torch.cat(outputs, dim=1).transpose(0, 1)


def _attend(
    query_HLD: Tensor, key_GLD: Tensor, value_GLD: Tensor, options: tuple[float, float, int]
) -> Tensor:
    scale, softcap, window = options
    L = query_HLD.shape[1]
    if softcap == 0 and (window == 0 or window >= L):
        return nn.functional.scaled_dot_product_attention(
            query_HLD[None], key_GLD[None], value_GLD[None], is_causal=True, scale=scale, enable_gqa=True
        )[0]
    repeats = query_HLD.shape[0] // key_GLD.shape[0]
    key_HLD, value_HLD = (tensor.repeat_interleave(repeats, dim=0) for tensor in (key_GLD, value_GLD))
    scores_HLL = (query_HLD @ key_HLD.transpose(1, 2)) * scale
    if softcap:
        scores_HLL = torch.tanh(scores_HLL / softcap) * softcap
    distance_LL = torch.arange(L, device=scores_HLL.device)[:, None] - torch.arange(
        L, device=scores_HLL.device
    )
    seen_LL = (distance_LL >= 0) & (distance_LL < (window or L))
    wide = torch.promote_types(scores_HLL.dtype, torch.float32)
    weights_HLL = scores_HLL.masked_fill(~seen_LL, float("-inf")).softmax(dim=2, dtype=wide)
    return weights_HLL.to(value_HLD.dtype) @ value_HLD
