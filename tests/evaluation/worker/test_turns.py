"""Work for an engine in parts."""

from __future__ import annotations

import pytest

from luthier.evaluation.worker.turns import TOKENS_A_TURN, turns


@pytest.mark.parametrize(
    ("lengths", "parts"),
    [
        ([], []),
        ([TOKENS_A_TURN, 1], [[TOKENS_A_TURN], [1]]),
        ([1000, 1048, 1], [[1000, 1048], [1]]),
        ([3, 5000, 4, 4], [[3], [5000], [4, 4]]),
    ],
)
def test_parts_keep_to_the_limit_and_their_order(lengths: list[int], parts: list[list[int]]) -> None:
    assert list(turns(lengths, lambda length: length)) == parts
