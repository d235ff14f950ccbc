"""Attention of new tokens over the keys and values that caches hold, as in generation: prompts, and what follows them.

Shape suffixes: T new tokens of all rows, B rows of one cache, H query heads, G key/value heads, C capacity, P tokens of
a prefix, D head size, R turned elements of a head. Importing this package does not import torch.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from luthier.kernels.tables import Impl, resolve

if TYPE_CHECKING:
    from torch import Tensor


class Cached:
    """Keys and values that the rows of one cache attend to.

    Attributes:
        key_BGCD: of each row; new ones are written into it. Dense, as all of them.
        value_BGCD: as `key_BGCD`.
        prefix: keys and values [G, P, D] that all rows see before their own; None: nothing.
        layout: where it lies and what it holds, for C++.
    """

    __slots__ = ("key_BGCD", "layout", "prefix", "value_BGCD")

    def __init__(
        self, key_BGCD: "Tensor", value_BGCD: "Tensor", prefix: "tuple[Tensor, Tensor] | None" = None
    ) -> None:
        """Raises ValueError where shapes, types or devices do not fit, or a tensor is not dense."""
        from luthier.kernels.operands import require_same

        tensors = (key_BGCD, value_BGCD, *(prefix or ()))
        require_same(**{f"tensor {place}": one for place, one in enumerate(tensors)})
        shapes = [tuple(one.shape) for one in tensors]
        fits = [len(shape) for shape in shapes] == [4, 4, 3, 3][: len(shapes)] and shapes[0] == shapes[1]
        if prefix is not None and fits:
            fits = shapes[2] == shapes[3] and (shapes[2][0], shapes[2][2]) == (shapes[0][1], shapes[0][3])
        if not fits or not all(one.is_contiguous() for one in tensors):
            raise ValueError(
                f"keys and values must be dense [B, G, C, D], those of a prefix [G, P, D], got {shapes}"
            )
        self.key_BGCD, self.value_BGCD, self.prefix = key_BGCD, value_BGCD, prefix
        before = (0, 0) if prefix is None else (prefix[0].data_ptr(), prefix[1].data_ptr())
        self.layout = Layout(
            addresses=(key_BGCD.data_ptr(), value_BGCD.data_ptr(), *before),
            num_rows=shapes[0][0],
            capacity=shapes[0][2],
            num_prefix=0 if prefix is None else shapes[2][1],
            head=(shapes[0][1], shapes[0][3]),
            is_bfloat16=str(key_BGCD.dtype) == "torch.bfloat16",
        )


class Layout(NamedTuple):
    """Where a `Cached` lies, how large it is and of what type: `head` are its key heads and their size."""

    addresses: tuple[int, int, int, int]
    num_rows: int
    capacity: int
    num_prefix: int
    head: tuple[int, int]
    is_bfloat16: bool


Span = tuple[int, int]
"""The columns [begin, end) of a cache that are new."""


class NewTokens(NamedTuple):
    """What is new, token by token: those of a row one after the other, row after row.

    Attributes:
        query: queries [T, H, D].
        key: keys [T, G, D], which are put into the caches.
        value: values, as `key`.
        angles: cosines and sines [T, R] by which queries and keys are turned before, as `rope` does; None: they are.
    """

    query: "Tensor"
    key: "Tensor"
    value: "Tensor"
    angles: "tuple[Tensor, Tensor] | None" = None


def attention_decode(
    new: NewTokens,
    caches: Sequence[Cached],
    spans: Sequence[Span],
    first: Sequence[int],
    *,
    scale: float,
    softcap: float = 0.0,
    impl: Impl = "auto",
) -> "Tensor":
    """Put new keys and values into the caches, and attend: [T, H, D].

    The rows are those of all caches, one cache after the other; `spans` says which columns of each cache are new,
    `first` in which column each row begins. A row has a new token for each new column from its first on, none where
    it begins behind them. A query sees the prefix of its cache, and its row's keys from the first up to its own
    column. Query head h reads key head h // (H / G). A score is `scale` times the dot product, then
    softcap * tanh(score / softcap) where `softcap` is not 0. There is no gradient.

    `cpu` (C++; bfloat16 or float32; softmax and sums in float32) reads each key once for many queries that share it, a
    prefix for those of many rows, where they lie. The bits of a token depend neither on the number of threads, nor on
    other rows, nor on which tokens of its row come in one call. `eager` is plain torch, cache by cache; `auto` takes
    what the committed table measured as faster.

    Raises:
        ValueError: shapes, dtypes, devices or counts do not fit, a cache has no room, or `impl` cannot run on them.
    """
    _check(new, caches, spans, first)
    if implementation(new.query, len(caches), impl=impl) == "eager":
        from luthier.kernels.attention_decode.reference import attention_decode_reference

        return attention_decode_reference(new, caches, spans, first, (scale, softcap))
    from luthier.kernels.attention_decode.cpu import attention_decode_cpu

    return attention_decode_cpu(new, caches, spans, first, (scale, softcap))


def count_tokens(caches: Sequence[Cached], spans: Sequence[Span], first: Sequence[int]) -> int:
    """How many tokens of all rows are new."""
    row = found = 0
    for one, (begin, end) in zip(caches, spans, strict=True):
        rows = first[row : row + one.layout.num_rows]
        found += sum(max(0, end - max(begin, column)) for column in rows)
        row += one.layout.num_rows
    return found


def implementation(query: "Tensor", num_caches: int, *, impl: Impl = "auto") -> str:
    """Return what runs for such queries over so many caches: cpu or eager.

    Raises:
        ValueError: `impl` cannot run on them.
    """
    from luthier.kernels.operands import no_triton, refusal

    why = no_triton("attention_decode", impl, query) or refusal(impl, query)
    return resolve("attention_decode", impl, why, query, shape_class(num_caches))


def shape_class(num_caches: int) -> str:
    """The class of a problem in the table."""
    return "one_cache" if num_caches < 2 else "several_caches"


def _check(new: NewTokens, caches: Sequence[Cached], spans: Sequence[Span], first: Sequence[int]) -> None:
    from luthier.kernels.operands import require_same

    query, key, value, angles = new
    require_same(
        query=query, key=key, value=value, **{f"angles {i}": one for i, one in enumerate(angles or ())}
    )
    shapes = [tuple(one.shape) for one in (query, key, value, *(angles or ()))]
    fits = len(shapes[0]) == len(shapes[1]) == 3 and shapes[1] == shapes[2] and 0 not in shapes[1][1:]
    fits = fits and shapes[0][0] == shapes[1][0] and shapes[0][2] == shapes[1][2]
    if not fits or not shapes[0][1] or shapes[0][1] % shapes[1][1]:
        raise ValueError(
            f"shapes must be query [T, H, D], key and value [T, G, D], H a multiple of G, got {shapes}"
        )
    if angles is not None and not _turns(shapes):
        raise ValueError(f"angles must be [T, R] with R even and at most D, got {shapes[3:]}")
    head, layouts = shapes[1][1:], [one.layout for one in caches]
    num_rows = sum(one.num_rows for one in layouts)
    if len(first) != num_rows or len(spans) != len(caches):
        raise ValueError(
            f"rows must be those of the caches, {num_rows} of {len(caches)}, got {len(first)} first columns and "
            f"{len(spans)} spans"
        )
    for one, cached, (begin, end) in zip(layouts, caches, spans, strict=True):
        if one.head != head or cached.key_BGCD.dtype != query.dtype or begin < 0:
            raise ValueError(
                f"a cache must hold {query.dtype} [B, {head[0]}, C, {head[1]}], got {cached.key_BGCD.dtype} "
                f"{tuple(cached.key_BGCD.shape)} with {begin} tokens"
            )
        if not begin < end <= one.capacity:
            raise ValueError(
                f"a cache needs room for {end - begin} new tokens after {begin}, got a capacity of {one.capacity}"
            )
    if first and min(first) < 0:
        raise ValueError(f"first keys must not be negative, got {min(first)}")
    if count_tokens(caches, spans, first) != shapes[0][0]:
        raise ValueError(
            f"new tokens must be {count_tokens(caches, spans, first)}, as spans and first columns say, got "
            f"{shapes[0][0]}"
        )


def _turns(shapes: "list[tuple[int, ...]]") -> bool:
    query, cos, sin = shapes[0], shapes[3], shapes[4]
    return len(cos) == 2 and cos == sin and cos[0] == query[0] and not cos[1] % 2 and 0 < cos[1] <= query[2]
