from collections.abc import Callable
from typing import Any

import pytest
import torch

from luthier.lm.cache import BatchCache


def test_cache_grows_beyond_its_capacity_and_keeps_chosen_rows() -> None:
    torch.manual_seed(0)
    keys, values = torch.randn(2, 3, 2, 9, 4)
    cache = BatchCache(1, 4)
    for start, end in [(0, 3), (3, 4), (4, 9)]:
        held = cache.update(keys[:, :, start:end], values[:, :, start:end], 0)
        assert torch.equal(held[0], keys[:, :, :end])
        assert torch.equal(held[1], values[:, :, :end])
        assert cache.get_seq_length() == end
    cache.keep([2, 0])
    (kept,) = cache.keys_values()
    assert torch.equal(kept[0], keys[[2, 0]])
    assert torch.equal(kept[1], values[[2, 0]])


def test_update_within_the_capacity_copies_nothing() -> None:
    cache = BatchCache(1, 8)
    first, _ = cache.update(torch.zeros(1, 1, 3, 2), torch.zeros(1, 1, 3, 2), 0)
    second, _ = cache.update(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2), 0)
    assert first.data_ptr() == second.data_ptr()


@pytest.mark.parametrize("change", ["grow", "repeat"])
def test_room_that_nobody_has_written_is_zero(change: str) -> None:
    """A row that begins later never writes there, and what is no number is none times 0 either."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # what is not filled is NaN then
    try:
        cache = BatchCache(1, 4)
        cache.update(torch.ones(2, 2, 4, 4), torch.ones(2, 2, 4, 4), 0)
        layer = cache.buffers[0]
        changes: dict[str, Callable[[], object]] = {
            "grow": lambda: layer.cached(1, None),
            "repeat": lambda: cache.repeat(2, 9),
        }
        changes[change]()
    finally:
        torch.use_deterministic_algorithms(False)
    for buffer in (layer.keys, layer.values):
        assert buffer.shape[2] > 4
        assert not buffer[:, :, 4:].count_nonzero()
        assert torch.equal(buffer[:, :, :4], torch.ones_like(buffer[:, :, :4]))


@pytest.mark.parametrize("change", ["grow", "repeat", "keep"])
def test_a_buffer_that_does_not_fit_leaves_a_cache_as_it_was(
    monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    keys, values = torch.randn(2, 3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    cache = BatchCache(1, 4)
    cache.update(keys, values, 0)
    layer = cache.buffers[0]

    class Full(torch.Tensor):
        """Values whose like fits nowhere."""

        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in (torch.Tensor.new_zeros, torch.Tensor.__getitem__):
                raise torch.OutOfMemoryError("no memory")
            parent: Any = super()
            return parent.__torch_function__(func, types, args, kwargs or {})

    monkeypatch.setattr(layer, "values", layer.values.as_subclass(Full))
    changes: dict[str, Callable[[], object]] = {
        "grow": lambda: layer.cached(1, None),
        "repeat": lambda: cache.repeat(2, 9),
        "keep": lambda: cache.keep([0]),
    }
    with pytest.raises(torch.OutOfMemoryError):
        changes[change]()
    monkeypatch.undo()
    assert layer.capacity == layer.keys.shape[2] == layer.values.shape[2]
    assert len(layer.keys) == len(layer.values) == 3
    cached = layer.cached(1, None)
    assert cached.layout.capacity == 8, "room is made at the next try"
    assert torch.equal(cached.key_BGCD[:, :, :4], keys)
