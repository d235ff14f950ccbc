"""The rows of several caches in one pass, which attend together where C++ can: prompts, and tokens that follow them.

Shape suffixes: B rows of a cache, T new tokens of all rows, Q new columns of a cache, K all of its columns, H query
heads, G key heads, D head size, R turned elements of a head.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from luthier.kernels.attention_decode import Cached, NewTokens, Span, attention_decode, implementation
from luthier.lm.attention import require_within_window
from luthier.lm.cache import BatchCache, Prefix


class CachedRows(NamedTuple):
    """Rows of a pass that share a cache.

    Attributes:
        num_rows: how many.
        cache: theirs.
        span: which of its columns are new.
        first: the column in which each row begins.
        prefix: what they see besides.
    """

    num_rows: int
    cache: BatchCache
    span: Span
    first: Sequence[int]
    prefix: Prefix | None

    @property
    def counts(self) -> list[int]:
        """How many new tokens each row has."""
        begin, end = self.span
        return [max(0, end - max(begin, first)) for first in self.first]

    def new_columns(self, device: torch.device) -> Tensor | None:
        """In which new columns each row has a token [B, Q]; None: in all."""
        begin, end = self.span
        if max(self.first) <= begin:
            return None
        return torch.arange(begin, end, device=device) >= torch.tensor(self.first, device=device)[:, None]

    def visible(self, device: torch.device) -> Tensor:
        """Which columns each new one sees [B, Q, K], where all are computed: one before its row sees itself."""
        begin, end = self.span
        keys = torch.arange(end, device=device)
        columns = keys[begin:, None]
        seen = (keys <= columns) & (keys >= torch.tensor(self.first, device=device)[:, None, None])
        return seen | (keys == columns)


class JointRows:
    """All rows of a pass.

    Attributes:
        parts: theirs, in the order of the rows.
        first: the column of its cache in which each row begins.
        spans: which columns of each cache are new.
        is_one_call: whether C++ attends for all parts in one call, as it does on a processor unless another
            implementation is forced or gradients are kept, which it has none of. Then the pass is about tokens, each of
            which goes through the model as a row of its own; else each part attends by itself.
        angles: cosines and sines [T, R] of the tokens, where the model would not make the right ones; else None.
    """

    def __init__(self, parts: Sequence[CachedRows], like: Tensor) -> None:
        """`like` has the type of the model, and is where it is."""
        self.parts = parts
        self.first = [first for part in parts for first in part.first]
        self.spans = [part.span for part in parts]
        self.is_one_call = attends_in_one_call(like)
        self.angles: tuple[Tensor, Tensor] | None = None

    def caches(self, layer: int, key_TGD: Tensor) -> list[Cached]:
        """A layer's caches with their prefixes, which have room for new tokens, the keys of which are like those."""
        found = []
        for part in self.parts:
            buffer = part.cache.buffers[layer]
            buffer.begin(part.num_rows, key_TGD)
            begin, end = part.span
            found.append(buffer.cached(end - begin, None if part.prefix is None else part.prefix[layer]))
        return found

    def advance(self, layer: int) -> None:
        """Count the new columns of a layer's caches."""
        for part in self.parts:
            part.cache.buffers[layer].length = part.span[1]

    def require_within(self, window: int | None, layer: int) -> None:
        """Check that no row outgrows the sliding window of a layer.

        Raises:
            InvalidArgument: one does (SEQUENCE_TOO_LONG).
        """
        if window is None:
            return
        for part in self.parts:
            before = 0 if part.prefix is None else part.prefix[layer][0].shape[2]
            require_within_window(before + part.span[1], window)

    def attend(
        self, new: NewTokens, layer: int, *, scale: float, softcap: float, window: int | None
    ) -> Tensor:
        """Let a layer's caches take the new keys and values, and attend: [T, H, D].

        Raises:
            InvalidArgument: a row outgrows the sliding window.
        """
        self.require_within(window, layer)
        caches = self.caches(layer, new.key)
        output = attention_decode(
            new, caches, self.spans, self.first, scale=scale, softcap=softcap, impl="cpu"
        )
        self.advance(layer)
        return output

    @cached_property
    def masks(self) -> list[Tensor]:
        """Of each part, which columns each new one sees [B, 1, Q, K], where parts attend by themselves."""
        return [part.visible(part.cache.buffers[0].keys.device)[:, None] for part in self.parts]


def attends_in_one_call(like: Tensor) -> bool:
    """Whether C++ attends for all rows of a model of such a type, where such a tensor is."""
    return implementation(like, 2) == "cpu" and not torch.is_grad_enabled()
