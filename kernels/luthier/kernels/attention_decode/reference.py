"""Eager reference of `attention_decode`, in plain torch: any float dtype and device.

Shape suffixes: those of the package, Q new columns of a cache, K keys that a row may see.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from luthier.kernels.attention_decode import Cached, NewTokens, Span
from luthier.kernels.rope.reference import rope_reference


@torch.no_grad()
def attention_decode_reference(
    new: NewTokens,
    caches: Sequence[Cached],
    spans: Sequence[Span],
    first: Sequence[int],
    options: tuple[float, float],
) -> Tensor:
    """Put into caches and attend -> [T, H, D]; `options` are scale and softcap. Memory: scores of a cache's columns."""
    query, key = new.query, new.key
    if new.angles is not None:
        query, key = (rope_reference(one, *new.angles) for one in (query, key))
    outputs, row, token = [torch.empty_like(query[:0])], 0, 0
    for one, span in zip(caches, spans, strict=True):
        first_B = torch.tensor(list(first[row : row + one.layout.num_rows]), device=query.device)
        is_new_BQ = torch.arange(*span, device=query.device) >= first_B[:, None]
        tokens = slice(token, token + int(is_new_BQ.sum()))
        for cache, states in ((one.key_BGCD, key), (one.value_BGCD, new.value)):
            cache[:, :, slice(*span)].transpose(1, 2)[is_new_BQ] = states[tokens]
        # Columns before the first of a row are computed along, and left out.
        query_BQHD = query.new_zeros(*is_new_BQ.shape, *query.shape[1:])
        query_BQHD[is_new_BQ] = query[tokens]
        outputs.append(_attend(query_BQHD, one, span, first_B, options)[is_new_BQ])
        row, token = row + one.layout.num_rows, tokens.stop
    return torch.cat(outputs)


def _attend(
    query_BQHD: Tensor, one: Cached, span: Span, first_B: Tensor, options: tuple[float, float]
) -> Tensor:
    B, _, H, _ = query_BQHD.shape
    scale, softcap = options
    end = span[1]
    key, value = one.key_BGCD[:, :, :end], one.value_BGCD[:, :, :end]
    columns = torch.arange(end, device=query_BQHD.device)
    last_Q = columns[span[0] :]
    first_BQ = first_B[:, None].minimum(last_Q)
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
