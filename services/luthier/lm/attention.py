"""Attention for packed batches and for generation over a shared prefix, as a transformers extension.

`IMPLEMENTATION` is registered with transformers' public `AttentionInterface`; a model that `load_model`
returns uses it. What it computes depends on what the caller passes through the model's forward as keyword
arguments:

- `packed_bounds`: the batch is one row of sequences; each attends causally to itself alone;
- `shared_prefix`: every row of the batch also attends to the keys and values of one common prefix;
- `joint_rows`: the batch is new tokens of the rows of several caches, each of which takes keys and values of its own;
- neither: what transformers' own `sdpa` does, with its masks.

Shape suffixes: B rows, T tokens of a packed row, Q queries, K keys, P prefix keys, H query heads, G
key/value heads, R = H / G, D head size, E hidden size, V vocabulary.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from luthier.errors import InvalidArgument, Reason
from luthier.kernels.attention_decode import NewTokens
from luthier.kernels.attention_varlen import attention_varlen
from luthier.kernels.dispatch import current_isa

if TYPE_CHECKING:
    from luthier.lm.joint_rows import JointRows

IMPLEMENTATION = "luthier_packed"
"""The name under which transformers knows `attention`."""

LayerKeysValues = tuple[Tensor, Tensor]
"""Keys and values of one layer: [1, G, P, D] each."""

_MANY_QUERIES = 8
"""Queries of each row from which a prefix is laid before the keys of every row, to be read by one fused kernel."""


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
        **options: transformers' own (`scaling`, `dropout`, `sliding_window`, `softcap`) and ours.

    Returns:
        [B, Q, H, D] and None (no attention weights are kept).

    Raises:
        InvalidArgument: keys outnumber the sliding window of the layer beside a shared prefix.
    """
    bounds: Sequence[int] | None = options.pop("packed_bounds", None)
    joint: JointRows | None = options.pop("joint_rows", None)
    scale: float = options.get("scaling") or query.shape[3] ** -0.5
    window: int | None = options.get("sliding_window")
    if joint is not None and joint.is_one_call:
        # A token a row: each has one query.
        new = NewTokens(query[:, :, 0], key[:, :, 0], value[:, :, 0])
        capped: float = options.get("softcap") or 0.0
        output_THD = joint.attend(new, _layer_of(module), scale=scale, softcap=capped, window=window)
        return output_THD[:, None], None
    if joint is not None:
        return _attend_apart(module, (query, key, value), joint, options), None
    prefix: Sequence[LayerKeysValues] | None = options.pop("shared_prefix", None)
    softcap: float = options.pop("softcap", None) or 0.0
    if bounds is not None:
        query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        packed = attention_varlen(query, key, value, bounds, scale=scale, softcap=softcap, window=window or 0)
        return packed[None], None
    if prefix is not None:
        assert attention_mask is not None
        prefix_key, prefix_value = prefix[_layer_of(module)]
        require_within_window(prefix_key.shape[2] + key.shape[2], window)
        own = (query, key, value, attention_mask)
        if query.device.type == "cpu" and query.shape[2] >= _MANY_QUERIES and not softcap:
            return _attend_joined(own, prefix_key, prefix_value, scale), None
        if _is_widened(query):
            own = (query.float(), key.float(), value.float(), attention_mask)
            prefix_key, prefix_value = prefix_key.float(), prefix_value.float()
        if query.device.type == "cpu" and not softcap:
            return _attend_merged(own, prefix_key, prefix_value, scale).to(query.dtype), None
        return _attend_with_prefix(own, prefix_key, prefix_value, (scale, softcap)).to(query.dtype), None
    if softcap:
        return _attend_capped((query, key, value), attention_mask, scale, softcap), None
    dtype = query.dtype
    if _is_widened(query):
        query, key, value = query.float(), key.float(), value.float()
    output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    return output.to(dtype), None


def _layer_of(module: Any) -> int:
    return int(module.layer_idx)


def _attend_apart(
    module: nn.Module,
    heads: tuple[Tensor, Tensor, Tensor],
    joint: "JointRows",
    options: dict[str, Any],
) -> Tensor:
    """Let each part's rows attend to what its cache holds, as if there were no other part."""
    outputs, start = [], 0
    for part, mask in zip(joint.parts, joint.masks, strict=True):
        query, key, value = (one[start : start + part.num_rows] for one in heads)
        key, value = part.cache.update(key, value, _layer_of(module))
        output, _ = attention(module, query, key, value, mask, **options, shared_prefix=part.prefix)
        outputs.append(output)
        start += part.num_rows
    return torch.cat(outputs)


def _is_widened(query: Tensor) -> bool:
    """Whether so few queries attend faster in float32, keys and values turned into it at every call.

    On AVX2, which knows no bfloat16, torch's products of few rows cost three to seven times as much in it.
    """
    few = query.shape[2] < _MANY_QUERIES and query.dtype == torch.bfloat16
    return few and query.device.type == "cpu" and current_isa() == "avx2"


def require_within_window(num_keys: int, window: int | None) -> None:
    """Check that a sequence of so many keys fits the sliding window of a layer.

    Raises:
        InvalidArgument: it does not (SEQUENCE_TOO_LONG).
    """
    if window is not None and num_keys > window:
        raise InvalidArgument(
            f"a sequence must fit the model's sliding window of {window} tokens, got {num_keys}",
            reason=Reason.SEQUENCE_TOO_LONG,
        )


def _capped(scores: Tensor, softcap: float) -> Tensor:
    return torch.tanh(scores / softcap) * softcap if softcap else scores


def _attend_capped(
    heads: tuple[Tensor, Tensor, Tensor], mask: Tensor | None, scale: float, softcap: float
) -> Tensor:
    """What `sdpa` computes, with capped scores, which it does not know; without a mask it is causal."""
    query, key, value = heads
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    if mask is None:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    scores = _capped(torch.matmul(query, key.transpose(2, 3)) * scale, softcap)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=3, dtype=torch.float32)
    return torch.matmul(weights.to(value.dtype), value).transpose(1, 2).contiguous()


def _attend_with_prefix(
    own: tuple[Tensor, Tensor, Tensor, Tensor],
    prefix_key: Tensor,
    prefix_value: Tensor,
    settings: tuple[float, float],
) -> Tensor:
    """One softmax over the prefix and the row's own keys; the prefix is read once for all rows.

    The softmax is float32. The queries of all rows and of the R heads that share a key head become
    the rows of one matrix product with the prefix (Hydragen, arXiv:2402.05099).
    """
    query, key, value, mask = own
    B, H, Q, D = query.shape
    G, P = key.shape[1], prefix_key.shape[2]
    R = H // G
    scale, softcap = settings
    query_BGRD = (query * scale).reshape(B, G, R * Q, D)
    query_GD = query_BGRD.transpose(0, 1).reshape(G, B * R * Q, D)
    prefix_scores = torch.matmul(query_GD, prefix_key[0].transpose(1, 2)).view(G, B, R * Q, P).transpose(0, 1)
    own_scores = _capped(torch.matmul(query_BGRD, key.transpose(2, 3)), softcap)
    prefix_scores = _capped(prefix_scores, softcap)
    hidden_pairs = ~mask.expand(B, R, Q, key.shape[2]).reshape(B, 1, R * Q, key.shape[2])
    own_scores = own_scores.masked_fill(hidden_pairs, float("-inf"))
    weights = (
        torch.cat([prefix_scores, own_scores], dim=3).softmax(dim=3, dtype=torch.float32).to(value.dtype)
    )
    prefix_weights = weights[..., :P].transpose(0, 1).reshape(G, B * R * Q, P)
    output = torch.matmul(weights[..., P:], value)
    output = output + torch.matmul(prefix_weights, prefix_value[0]).view(G, B, R * Q, D).transpose(0, 1)
    return output.reshape(B, H, Q, D).transpose(1, 2).contiguous()


def _attend_merged(
    own: tuple[Tensor, Tensor, Tensor, Tensor], prefix_key: Tensor, prefix_value: Tensor, scale: float
) -> Tensor:
    """The same on a processor: attention to the prefix and to a row's own keys, weighed by their sums of exponentials.

    The operator behind `scaled_dot_product_attention` holds no scores and copies no keys; it alone tells those sums.
    """
    query, key, value, mask = own
    B, H, Q, D = query.shape
    bias = mask.new_zeros(mask.shape, dtype=query.dtype).masked_fill_(~mask, float("-inf"))
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    own_output, own_log_BHQ = attend(query, key, value, attn_mask=bias, scale=scale)
    query_1HND = query.transpose(0, 1).reshape(1, H, B * Q, D)
    output_1HND, log_1HN = attend(query_1HND, prefix_key, prefix_value, scale=scale)
    prefix_output = output_1HND.view(H, B, Q, D).transpose(0, 1)
    prefix_log_BHQ = log_1HN.view(H, B, Q).transpose(0, 1)
    share = torch.sigmoid(own_log_BHQ - prefix_log_BHQ)[..., None]
    merged = torch.lerp(prefix_output.float(), own_output.float(), share.float())
    return merged.to(query.dtype).transpose(1, 2).contiguous()


def _attend_joined(
    own: tuple[Tensor, Tensor, Tensor, Tensor], prefix_key: Tensor, prefix_value: Tensor, scale: float
) -> Tensor:
    """The same for many queries, whose scores are not worth holding: the prefix is copied for every row."""
    query, key, value, mask = own
    B, P = query.shape[0], prefix_key.shape[2]
    output = nn.functional.scaled_dot_product_attention(
        query,
        torch.cat([prefix_key.expand(B, -1, -1, -1), key], dim=2),
        torch.cat([prefix_value.expand(B, -1, -1, -1), value], dim=2),
        attn_mask=nn.functional.pad(mask, (P, 0), value=True),
        scale=scale,
        enable_gqa=True,
    )
    return output.transpose(1, 2).contiguous()


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


AttentionInterface.register(IMPLEMENTATION, attention)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
