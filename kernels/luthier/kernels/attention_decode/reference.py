"""Eager reference of `attention_decode`, in plain torch: any float dtype and device.

Shape suffixes: those of the package, K keys that a row may see.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from luthier.kernels.attention_decode import Cached, NewTokens
from luthier.kernels.rope.reference import rope_reference


@torch.no_grad()
def attention_decode_reference(
    new: NewTokens,
    caches: Sequence[Cached],
    held: Sequence[int],
    first: Sequence[int],
    options: tuple[float, float],
) -> Tensor:
    """Append and attend -> [N, Q, H, D]; `options` are scale and softcap. Memory: the scores of a cache's rows."""
    query, key = new.query, new.key
    if new.angles is not None:
        cos, sin = (one.flatten(0, 1) for one in new.angles)
        query, key = (rope_reference(one.flatten(0, 1), cos, sin).view(one.shape) for one in (query, key))
    outputs, row = [torch.empty_like(query[:0])], 0
    for one, length in zip(caches, held, strict=True):
        end = row + one.layout.num_rows
        for cache, states in ((one.key_BGCD, key), (one.value_BGCD, new.value)):
            cache[:, :, length : length + key.shape[1]] = states[row:end].transpose(1, 2)
        outputs.append(_attend(query[row:end], one, length, first[row:end], options))
        row = end
    return torch.cat(outputs)


def _attend(
    query_BQHD: Tensor, one: Cached, length: int, first: Sequence[int], options: tuple[float, float]
) -> Tensor:
    B, Q, H, _ = query_BQHD.shape
    scale, softcap = options
    end = length + Q
    key, value = one.key_BGCD[:, :, :end], one.value_BGCD[:, :, :end]
    columns = torch.arange(end, device=query_BQHD.device)
    last_Q = columns[length:]
    first_BQ = torch.tensor(list(first), device=query_BQHD.device)[:, None].minimum(last_Q)
    seen_BQK = (columns >= first_BQ[:, :, None]) & (columns <= last_Q[:, None])
    if one.prefix is not None:
        key, value = (
            torch.cat([before.expand(B, -1, -1, -1), own], dim=2)
            for before, own in zip(one.prefix, (key, value), strict=True)
        )
        seen_BQK = torch.nn.functional.pad(seen_BQK, (key.shape[2] - end, 0), value=True)
    query_BHQD, mask = query_BQHD.transpose(1, 2), seen_BQK[:, None]
    if not softcap:
        output = torch.nn.functional.scaled_dot_product_attention(
            query_BHQD, key, value, attn_mask=mask, scale=scale, enable_gqa=True
        )
        return output.transpose(1, 2)
    key, value = (part.repeat_interleave(H // part.shape[1], dim=1) for part in (key, value))
    scores = torch.tanh((query_BHQD @ key.transpose(2, 3)) * scale / softcap) * softcap
    wide = torch.promote_types(scores.dtype, torch.float32)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=3, dtype=wide)
    return (weights.to(value.dtype) @ value).transpose(1, 2)
