"""The rows of several caches in one pass, which attend together where C++ can.

Shape suffixes: N rows of all caches, B of one, Q queries, K keys, H query heads, D head size.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from luthier.kernels.attention_decode import Cached, NewTokens, attention_decode, implementation
from luthier.lm.attention import require_within_window
from luthier.lm.cache import BatchCache, Prefix


class CachedRows(NamedTuple):
    """Rows of a pass that share a cache.

    Attributes:
        num_rows: how many.
        cache: theirs, which holds tokens already.
        visible: which keys each of their queries sees [B, Q, K].
        first: the first of its own keys that each row sees, of which `visible` tells the same.
        prefix: what they see besides.
    """

    num_rows: int
    cache: BatchCache
    visible: Tensor
    first: Sequence[int]
    prefix: Prefix | None


class JointRows:
    """All rows of a pass.

    Attributes:
        parts: theirs, in the order of the rows.
        first: the first of its own keys that each row sees.
        is_one_call: whether C++ attends for all parts in one call, as it does on a processor unless another
            implementation is forced or gradients are kept, which it has none of; else each part attends by itself.
    """

    def __init__(self, parts: Sequence[CachedRows]) -> None:
        self.parts = parts
        self.first = [first for part in parts for first in part.first]
        fastest = implementation(parts[0].cache.buffers[0].keys, len(parts))
        self.is_one_call = fastest == "cpu" and not torch.is_grad_enabled()

    def held(self, layer: int) -> list[int]:
        """How many tokens each cache holds in a layer."""
        return [part.cache.buffers[layer].length for part in self.parts]

    def caches(self, layer: int, num_new: int = 1) -> list[Cached]:
        """A layer's caches with their prefixes, which have room for so many new tokens of each row."""
        return [
            part.cache.buffers[layer].cached(num_new, None if part.prefix is None else part.prefix[layer])
            for part in self.parts
        ]

    def advance(self, layer: int, num_new: int = 1) -> None:
        """Count the new tokens that a layer's caches were given."""
        for part in self.parts:
            part.cache.buffers[layer].length += num_new

    def require_within(self, window: int | None, layer: int, num_new: int = 1) -> None:
        """Check that no row outgrows the sliding window of a layer.

        Raises:
            InvalidArgument: one does (SEQUENCE_TOO_LONG).
        """
        if window is None:
            return
        for part, length in zip(self.parts, self.held(layer), strict=True):
            before = 0 if part.prefix is None else part.prefix[layer][0].shape[2]
            require_within_window(before + length + num_new, window)

    def attend(
        self, new: NewTokens, layer: int, *, scale: float, softcap: float, window: int | None
    ) -> Tensor:
        """Let a layer's caches take the new keys and values, and attend: [N, Q, H, D].

        Raises:
            InvalidArgument: a row outgrows the sliding window.
        """
        num_new = new.query.shape[1]
        self.require_within(window, layer, num_new)
        caches, held = self.caches(layer, num_new), self.held(layer)
        output = attention_decode(new, caches, held, self.first, scale=scale, softcap=softcap, impl="cpu")
        self.advance(layer, num_new)
        return output
