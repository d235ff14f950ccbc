"""`attention_varlen` by torch's FlexAttention: one kernel compiled for all batches, told by a mask of blocks.

Shape suffixes: T tokens, Q blocks of 128 queries, K blocks of 128 keys, H query heads, G key/value heads, D head size.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from luthier.kernels.attention_varlen.bounds import bounds_on, distinct, kept, longest_of

_BLOCK = 128
# Kernels are compiled for each number and size of heads, for training and without, for batches of one block and of
# more: a worker that has seen three models would be past torch's own limit of 8.
_MOST_COMPILED = 64
ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def attend_flex(
    query_THD: Tensor,
    key_TGD: Tensor,
    value_TGD: Tensor,
    cu_seqlens: Sequence[int],
    scale: float,
    softcap: float,
    window: int,
) -> Tensor:
    """Attention output [T, H, D]; at least one token.

    Raises:
        torch._dynamo.exc.FailOnRecompileLimitHit: there were more kinds of heads in this process than are compiled.
    """
    _, H, D = query_THD.shape
    bounds, device = distinct(cu_seqlens), query_THD.device
    mask = block_mask(bounds, window if window < longest_of(bounds) else 0, device)
    heads = (tensor.transpose(0, 1)[None] for tensor in (query_THD, key_TGD, value_TGD))
    output = _compiled()(
        *heads,
        score_mod=_score_mod(scale * D**0.5, softcap, H, device),
        block_mask=mask,
        enable_gqa=True,
        # Else short batches go to another kernel, for decoding.
        kernel_options={"BACKEND": "TRITON"},
    )
    out_THD: Tensor = output[0].transpose(0, 1)
    return out_THD


@functools.cache
def _compiled() -> Callable[..., Any]:
    # fullgraph: at its limit of kernels torch fails, instead of computing all T x T scores without a word.
    options = {"dynamic": True, "fullgraph": True, "recompile_limit": _MOST_COMPILED}
    compiled: Callable[..., Any] = torch.compile(flex_attention, **options)  # type: ignore[call-overload] # no overload has the limit
    return compiled


@kept
def block_mask(bounds: tuple[int, ...], window: int, device: torch.device) -> BlockMask:
    """Which keys each query sees, as FlexAttention wants it: blocks seen in part, blocks seen whole, and a test.

    The same as torch's create_block_mask gives, without the T x T elements that it looks at.

    Args:
        bounds: from 0, rising, to T > 0.
        window: as in `attention_varlen`.
        device: where it is made.
    """
    T = bounds[-1]
    first_T = first_seen(bounds, window, device)
    num_blocks = -(-T // _BLOCK)
    # The first key that a query sees rises with the query: a block's first and last query tell of all.
    least_Q = first_T[::_BLOCK] // _BLOCK
    # A last block that T cuts short is never seen whole.
    whole_Q = torch.full_like(least_Q, num_blocks)
    ends = first_T[_BLOCK - 1 :: _BLOCK]
    whole_Q[: ends.shape[0]] = (ends + _BLOCK - 1) // _BLOCK
    row_Q1, column_K = (torch.arange(num_blocks, device=device, dtype=torch.int32) for _ in range(2))
    row_Q1 = row_Q1[:, None]
    seen_QK = (column_K >= least_Q[:, None]) & (column_K <= row_Q1)
    whole_QK = (column_K >= whole_Q[:, None]) & (column_K < row_Q1)

    def sees(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key >= first_T[query])

    return BlockMask.from_kv_blocks(
        *_listed(seen_QK & ~whole_QK),
        *_listed(whole_QK),
        BLOCK_SIZE=_BLOCK,
        mask_mod=sees,
        seq_lengths=(T, T),
    )


def first_seen(bounds: tuple[int, ...], window: int, device: torch.device) -> Tensor:
    """The first key that each query sees, int32 [T]: sequences and window in one, so that one kernel does for both."""
    T = bounds[-1]
    starts = bounds_on(bounds, device)
    start_T = torch.repeat_interleave(starts[:-1], starts.diff(), output_size=T)
    if window == 0:
        return start_T
    return torch.maximum(start_T, torch.arange(T, device=device, dtype=torch.int32) - (window - 1))


def _listed(blocks_QK: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of each row are set, int32 [1, 1, Q], and the columns of these before all others [1, 1, Q, K]."""
    ones_QK = blocks_QK.int()
    order_QK = ones_QK.argsort(dim=1, descending=True, stable=True).int()
    return ones_QK.sum(dim=1, dtype=torch.int32)[None, None], order_QK[None, None]


@kept
def _score_mod(scaled: float, softcap: float, num_heads: int, device: torch.device) -> ScoreMod | None:
    """What is done to the scores, which are scaled by D^-0.5 already; None where that is all.

    The numbers stand in tensors, one for each head: as plain ones they would be compiled in, or become symbols, which
    the kernel's own `scale` must not be.
    """
    is_usual = math.isclose(scaled, 1.0, rel_tol=1e-6)
    if is_usual and softcap == 0:
        return None
    factor_H = torch.full((num_heads,), 1.0 if is_usual else scaled, dtype=torch.float32, device=device)
    cap_H = torch.full((num_heads,), softcap, dtype=torch.float32, device=device)

    def rescaled(score: Tensor, _batch: Tensor, head: Tensor, _query: Tensor, _key: Tensor) -> Tensor:
        return score * factor_H[head]

    def capped(score: Tensor, _batch: Tensor, head: Tensor, _query: Tensor, _key: Tensor) -> Tensor:
        return torch.tanh(score * factor_H[head] / cap_H[head]) * cap_H[head]

    return capped if softcap else rescaled
