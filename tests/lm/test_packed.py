import pytest

from luthier.errors import InvalidArgument
from luthier.lm.packed import pack


def test_pack_lays_sequences_end_to_end_and_restarts_positions() -> None:
    batch = pack([([7, 8, 9], [False, True, True]), ([4], [False])])
    assert batch.input_ids.tolist() == [7, 8, 9, 4]
    assert batch.position_ids.tolist() == [0, 1, 2, 0]
    assert batch.supervised.tolist() == [False, True, True, False]
    assert batch.cu_seqlens == (0, 3, 4)


def test_pack_refuses_nothing_and_empty_sequences() -> None:
    with pytest.raises(InvalidArgument, match="at least one sequence, got none"):
        pack([])
    with pytest.raises(InvalidArgument, match=r"sequence 1 .* got 0 tokens"):
        pack([([1], [True]), ([], [])])


def test_pack_refuses_flags_that_do_not_match_the_tokens() -> None:
    with pytest.raises(InvalidArgument, match="got 2 tokens and 1 flags"):
        pack([([1, 2], [True])])
