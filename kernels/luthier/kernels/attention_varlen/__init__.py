"""Causal attention of packed sequences, each to itself alone.

Shape suffixes: T tokens, H query heads, G key/value heads, D head size. Importing this package does not import torch.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from luthier.kernels.tables import Impl, resolve

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def attention_varlen(
    query_THD: "Tensor",
    key_TGD: "Tensor",
    value_TGD: "Tensor",
    cu_seqlens: Sequence[int],
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    window: int = 0,
    impl: Impl = "auto",
) -> "Tensor":
    """Attention output [T, H, D] of sequences that lie end to end; sequence i is [cu_seqlens[i], cu_seqlens[i + 1]).

    Query head h reads key head h // (H / G). A score is `scale` (default D^-0.5) times the dot product, then
    softcap * tanh(score / softcap) where `softcap` is not 0; a query sees the last `window` tokens up to itself, or
    all if 0. `cpu` (C++; bfloat16 or float32; softmax in float32) never holds the scores of more than 48 queries of a
    head per thread, and the bits of a row depend neither on the number of threads nor on the other sequences; `eager`
    is plain torch; `auto` takes what the committed table measured as faster and, on a GPU, the first library of
    `gpu.BACKENDS` that can run.

    Raises:
        ValueError: shapes, dtypes, devices or boundaries do not fit, or `impl` cannot run on them.
    """
    _check(query_THD, key_TGD, value_TGD, cu_seqlens)
    if softcap < 0 or window < 0:
        raise ValueError(f"softcap and window must not be negative, got {softcap}, {window}")
    scale = query_THD.shape[2] ** -0.5 if scale is None else scale
    from luthier.kernels.operands import no_triton, refusal

    longest = max((end - start for start, end in pairwise(cu_seqlens)), default=0)
    why = refusal(impl, query_THD) or no_triton("attention_varlen", impl, query_THD)
    chosen = resolve("attention_varlen", impl, why, query_THD, shape_class(longest))
    if impl == "auto" and query_THD.device.type == "cuda" and longest > 0:
        from luthier.kernels.attention_varlen.gpu import attend

        return attend(query_THD, key_TGD, value_TGD, cu_seqlens, scale, softcap, window)
    if chosen == "eager":
        from luthier.kernels.attention_varlen.reference import attention_varlen_reference

        return attention_varlen_reference(query_THD, key_TGD, value_TGD, cu_seqlens, scale, softcap, window)
    from luthier.kernels.attention_varlen.cpu import attention_varlen_op

    bounds = list(cu_seqlens)
    out_THD: Tensor = attention_varlen_op(query_THD, key_TGD, value_TGD, bounds, [scale, softcap], window)[0]
    return out_THD


def shape_class(longest: int) -> str:
    """The class of a problem in the table, by its longest sequence."""
    return "short" if longest <= 1024 else "long"


def implementation(
    device: "torch.device", dtype: "torch.dtype", head_dim: int, *, softcap: float = 0.0
) -> str:
    """What `auto` runs for such tensors, for the record of a run: C++, eager, or the name of a library on a GPU.

    C++ and eager both, where the table takes one for short sequences and the other for long ones.
    """
    import torch

    from luthier.kernels.operands import no_triton, refusal

    if device.type == "cuda":
        from luthier.kernels.attention_varlen.gpu import Inputs, backend_for

        return backend_for(Inputs(device=device, dtype=dtype, head_dim=head_dim, softcap=softcap)).name
    example = torch.empty(0, 1, head_dim, dtype=dtype, device=device)
    why = refusal("auto", example) or no_triton("attention_varlen", "auto", example)
    chosen = [resolve("attention_varlen", "auto", why, example, name) for name in ("short", "long")]
    return " and ".join(dict.fromkeys("C++" if one == "cpu" else one for one in chosen))


def _check(query: "Tensor", key: "Tensor", value: "Tensor", cu_seqlens: Sequence[int]) -> None:
    from luthier.kernels.operands import require_same

    require_same(query=query, key=key, value=value)
    shapes = [tuple(tensor.shape) for tensor in (query, key, value)]
    fits = [len(shape) for shape in shapes] == [3, 3, 3] and shapes[1] == shapes[2]
    fits = fits and shapes[0][0] == shapes[1][0] and shapes[0][2] == shapes[1][2] and 0 not in shapes[1][1:]
    if not fits or shapes[0][1] == 0 or shapes[0][1] % shapes[1][1] != 0:
        raise ValueError(
            f"shapes must be query [T, H, D], key and value [T, G, D] with H a multiple of G, got {shapes}"
        )
    rising = all(start <= end for start, end in pairwise(cu_seqlens))
    if not cu_seqlens or cu_seqlens[0] != 0 or cu_seqlens[-1] != query.shape[0] or not rising:
        raise ValueError(f"cu_seqlens must rise from 0 to {query.shape[0]}, got {tuple(cu_seqlens)}")
