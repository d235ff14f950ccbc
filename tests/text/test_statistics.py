"""Length statistics against numpy."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from luthier.text.statistics import Lengths


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=200), st.integers(0, 200))
def test_summary_matches_numpy(lengths: list[int], cut: int) -> None:
    counted = Lengths(lengths[:cut])
    for length in lengths[cut:]:
        counted.add(length)
    summary = counted.summary()
    assert (summary.count, summary.sum) == (len(lengths), sum(lengths))
    assert (summary.minimum, summary.maximum) == (min(lengths), max(lengths))
    for percent, value in ((5, summary.p5), (50, summary.p50), (95, summary.p95)):
        assert value == np.percentile(lengths, percent, method="inverted_cdf")


def test_summary_of_nothing_is_zero() -> None:
    assert Lengths().summary().count == 0
