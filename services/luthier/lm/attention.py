"""Attention for packed batches and for generation over a shared prefix, as a transformers extension.

`IMPLEMENTATION` is registered with transformers' public `AttentionInterface`; a model that `load_model`
returns uses it. What it computes depends on what the caller passes through the model's forward as keyword
arguments:

- `packed_bounds`: the batch is one row of sequences; each attends causally to itself alone;
- `shared_prefix`: every row of the batch also attends to the keys and values of one common prefix;
- neither: what transformers' own `sdpa` does, with its masks.

Shape suffixes: B rows, T tokens of a packed row, Q queries, K keys, P prefix keys, H query heads, G
key/value heads, R = H / G, D head size, E hidden size, V vocabulary.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from luthier.errors import InvalidArgument, Reason

IMPLEMENTATION = "luthier_packed"
"""The name under which transformers knows `attention`."""

LayerKeysValues = tuple[Tensor, Tensor]
"""Keys and values of one layer: [1, G, P, D] each."""


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """The function that transformers calls for every layer; see the module's docstring for its modes.

    Args:
        module: the attention module; its `layer_idx` picks the layer of a shared prefix.
        query: [B, H, Q, D]; key and value: [B, G, K, D], not repeated for grouped queries.
        key: see query.
        value: see query.
        attention_mask: bool [B, 1, Q, K] (True attends), or what transformers made, or None.
        **options: transformers' own (`scaling`, `dropout`, `sliding_window`) and ours.

    Returns:
        [B, Q, H, D] and None (no attention weights are kept).

    Raises:
        InvalidArgument: keys outnumber the sliding window of the layer in a mode of ours.
    """
    bounds: Sequence[int] | None = options.pop("packed_bounds", None)
    prefix: Sequence[LayerKeysValues] | None = options.pop("shared_prefix", None)
    if bounds is None and prefix is None:
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return output, None
    scale = options.get("scaling")
    window = options.get("sliding_window")
    if prefix is not None:
        assert attention_mask is not None
        prefix_key, prefix_value = prefix[int(module.layer_idx)]  # type: ignore[arg-type]
        _check_window(prefix_key.shape[2] + key.shape[2], window)
        own = (query, key, value, attention_mask)
        return _attend_with_prefix(own, prefix_key, prefix_value, scale), None
    assert bounds is not None
    return _attend_packed(query, key, value, bounds, (scale, options.get("dropout", 0.0), window)), None


def _check_window(num_keys: int, window: int | None) -> None:
    if window is not None and num_keys > window:
        raise InvalidArgument(
            f"a sequence must fit the model's sliding window of {window} tokens, got {num_keys}",
            reason=Reason.SEQUENCE_TOO_LONG,
        )


def _attend_packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Sequence[int],
    settings: tuple[float | None, float, int | None],
) -> Tensor:
    scale, dropout, window = settings
    lengths = [end - start for start, end in pairwise(bounds)]
    _check_window(max(lengths), window)
    # One split has one gradient; a slice for each sequence would fill a gradient of the whole row each.
    parts = zip(*(torch.split(tensor, lengths, dim=2) for tensor in (query, key, value)), strict=True)
    outputs = [
        nn.functional.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, is_causal=True, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
        )
        for q, k, v in parts
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous()


def _attend_with_prefix(
    own: tuple[Tensor, Tensor, Tensor, Tensor],
    prefix_key: Tensor,
    prefix_value: Tensor,
    scale: float | None,
) -> Tensor:
    """One softmax over the prefix and the row's own keys; the prefix is read once for all rows.

    The softmax is float32. The queries of all rows and of the R heads that share a key head become
    the rows of one matrix product with the prefix (Hydragen, arXiv:2402.05099).
    """
    query, key, value, mask = own
    B, H, Q, D = query.shape
    G, P = key.shape[1], prefix_key.shape[2]
    R = H // G
    scale = D**-0.5 if scale is None else scale
    query_BGRD = (query * scale).reshape(B, G, R * Q, D)
    query_GD = query_BGRD.transpose(0, 1).reshape(G, B * R * Q, D)
    prefix_scores = torch.matmul(query_GD, prefix_key[0].transpose(1, 2)).view(G, B, R * Q, P).transpose(0, 1)
    own_scores = torch.matmul(query_BGRD, key.transpose(2, 3))
    hidden_pairs = ~mask.expand(B, R, Q, key.shape[2]).reshape(B, 1, R * Q, key.shape[2])
    own_scores = own_scores.masked_fill(hidden_pairs, float("-inf"))
    weights = (
        torch.cat([prefix_scores, own_scores], dim=3).softmax(dim=3, dtype=torch.float32).to(value.dtype)
    )
    prefix_weights = weights[..., :P].transpose(0, 1).reshape(G, B * R * Q, P)
    output = torch.matmul(weights[..., P:], value)
    output = output + torch.matmul(prefix_weights, prefix_value[0]).view(G, B, R * Q, D).transpose(0, 1)
    return output.reshape(B, H, Q, D).transpose(1, 2).contiguous()


def packed_forward(
    model: PreTrainedModel, input_ids_T: Tensor, position_ids_T: Tensor, cu_seqlens: Sequence[int]
) -> Tensor:
    """Final hidden states [T, E] of a packed batch, after the last norm and before the vocabulary matmul.

    Raises:
        InvalidArgument: the boundaries do not start at 0, rise, and end at T.
    """
    T = input_ids_T.shape[0]
    rising = all(a < b for a, b in pairwise(cu_seqlens))
    if len(cu_seqlens) < 2 or cu_seqlens[0] != 0 or cu_seqlens[-1] != T or not rising:
        raise InvalidArgument(f"boundaries must rise from 0 to {T}, got {tuple(cu_seqlens)}")
    # A four-dimensional mask is handed through as it is: this one stops transformers from building one of T
    # x T.
    unused_mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=input_ids_T.device)
    output = model.base_model(
        input_ids=input_ids_T[None],
        position_ids=position_ids_T[None],
        attention_mask=unused_mask,
        use_cache=False,
        packed_bounds=tuple(cu_seqlens),
    )
    hidden: Tensor = output.last_hidden_state[0]
    return hidden


def head_weight(model: PreTrainedModel) -> Tensor:
    """The vocabulary matrix [V, E] that makes logits of hidden states (the embedding, if they are tied)."""
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    weight: Tensor = head.weight
    return weight


AttentionInterface.register(IMPLEMENTATION, attention)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
