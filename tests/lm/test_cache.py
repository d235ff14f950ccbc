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
