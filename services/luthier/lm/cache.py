"""Keys and values of a batch that generates, in buffers that are written in place.

transformers' own dynamic cache copies itself at every token; this one copies when it grows or loses rows.
Shape suffixes: B rows, G key/value heads, K tokens held, C capacity, D head size.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from luthier.kernels.attention_decode import Cached
from luthier.lm.attention import LayerKeysValues

Prefix = Sequence[LayerKeysValues]
"""Keys and values [1, G, P, D] of each layer that all rows of a batch begin with."""


class BufferedLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer's keys and values [B, G, C, D], of which the first `length` tokens are real."""

    def __init__(self, capacity: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys: Tensor
        self.values: Tensor
        self.capacity = capacity
        self.length = 0
        self._cached: tuple[LayerKeysValues | None, Cached] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make the buffers; transformers' cache calls it, and so does the first update."""
        del value_states
        self.begin(key_states.shape[0], key_states.transpose(1, 2)[0])

    def begin(self, num_rows: int, key_QGD: Tensor) -> None:
        """Make the buffers for rows with such keys, if there are none.

        They are zero, as every buffer after them: of a row that begins in a later column, what comes before is never
        written, and is multiplied with weights of 0 where rows attend all at once.
        """
        if self.is_initialized:
            return
        self.dtype, self.device = key_QGD.dtype, key_QGD.device
        shape = num_rows, key_QGD.shape[1], self.capacity, key_QGD.shape[2]
        self._hold(key_QGD.new_zeros(shape), key_QGD.new_zeros(shape))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append [B, G, Q, D] keys and values; returns views of all that is held."""
        end = self.length + key_states.shape[2]
        if not self.is_initialized:
            self.capacity = max(self.capacity, end)
            self.lazy_initialization(key_states, value_states)
        self._reserve(key_states.shape[2])
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def cached(self, num_new: int, prefix: LayerKeysValues | None) -> Cached:
        """What is held, with room for so many new tokens, and a prefix before it, for `attention_decode`.

        It is the same object until a buffer is another one.
        """
        self._reserve(num_new)
        if self._cached is None or self._cached[0] is not prefix:
            before = None if prefix is None else (prefix[0][0], prefix[1][0])
            self._cached = prefix, Cached(self.keys, self.values, before)
        return self._cached[1]

    def _reserve(self, num_new: int) -> None:
        end = self.length + num_new
        if end <= self.capacity:
            return
        rows, heads, _, size = self.keys.shape
        shape = rows, heads, max(end, 2 * self.capacity), size
        keys, values = self.keys.new_zeros(shape), self.values.new_zeros(shape)
        for buffer, before in ((keys, self.keys), (values, self.values)):
            buffer[:, :, : self.length] = before[:, :, : self.length]
        self._hold(keys, values)

    def _hold(self, keys: Tensor, values: Tensor) -> None:
        """Take both buffers when both are there: one that did not fit leaves all as it was."""
        self.keys, self.values = keys, values
        self.capacity = keys.shape[2]
        self._cached = None

    def keep(self, rows: Tensor) -> None:
        """Keep the given rows (int64 indices), in that order."""
        self._hold(self.keys[rows], self.values[rows])

    def repeat(self, times: int, capacity: int) -> None:
        """Hold each row so many times, one after the other, with room for `capacity` tokens."""
        rows, heads, _, size = self.keys.shape
        shape = rows * times, heads, capacity, size
        keys, values = self.keys.new_zeros(shape), self.values.new_zeros(shape)
        for buffer, before in ((keys, self.keys), (values, self.values)):
            parts = buffer.view(rows, times, heads, capacity, size)
            parts[:, :, :, : self.length] = before[:, None, :, : self.length]
        self._hold(keys, values)

    def get_seq_length(self) -> int:
        """Tokens held."""
        return self.length

    def get_max_length(self) -> int:
        """-1: it grows."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that the next `query_length` queries see, and the offset of the first."""
        return self.length + query_length, 0


class BatchCache(Cache):
    """A `BufferedLayer` for each of `num_layers` layers."""

    def __init__(self, num_layers: int, capacity: int) -> None:
        self.buffers = [BufferedLayer(capacity) for _ in range(num_layers)]
        super().__init__(layers=list(self.buffers))

    def keep(self, rows: Sequence[int]) -> None:
        """Keep the given rows of the batch, in that order, in every layer."""
        indices = torch.tensor(rows, device=self.buffers[0].keys.device)
        for layer in self.buffers:
            layer.keep(indices)

    def repeat(self, times: int, capacity: int) -> None:
        """Hold each row of the batch so many times, one after the other, with room for `capacity` tokens in all."""
        for layer in self.buffers:
            layer.repeat(times, capacity)

    def keys_values(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values [B, G, K, D] of every layer, compact."""
        return [
            (layer.keys[:, :, : layer.length].contiguous(), layer.values[:, :, : layer.length].contiguous())
            for layer in self.buffers
        ]

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens, as a pass that failed may have left some in some layers."""
        for layer in self.buffers:
            layer.length = min(layer.length, length)
