"""Rows that are too long."""

from __future__ import annotations

import pytest
from tests.text.test_rendering import TWO_TURNS, renderer

from luthier.text.lengths import LengthLimit, LengthPolicy, fit, why_unsupervised
from luthier.text.rendering import RenderingError


def limit(max_tokens: int, policy: LengthPolicy) -> LengthLimit:
    return LengthLimit(max_tokens=max_tokens, policy=policy)


def test_fit_drops_cuts_or_refuses() -> None:
    rendered = renderer().render(TWO_TURNS)
    length = len(rendered.input_ids)
    assert fit(rendered, limit(length, LengthPolicy.FAIL)) is rendered
    assert fit(rendered, limit(length - 1, LengthPolicy.DROP)) is None
    cut = fit(rendered, limit(10, LengthPolicy.TRUNCATE))
    assert cut is not None
    assert (len(cut.input_ids), len(cut.loss_mask), cut.truncated) == (10, 10, True)
    with pytest.raises(RenderingError, match=f"at most 5 tokens, got {length}") as caught:
        fit(rendered, limit(5, LengthPolicy.FAIL))
    assert caught.value.reason == "SEQUENCE_TOO_LONG"


def test_why_unsupervised_tells_a_cut_from_a_record_without_an_answer() -> None:
    rendered = renderer().render(TWO_TURNS)
    cut = fit(rendered, limit(10, LengthPolicy.TRUNCATE))
    assert cut is not None
    assert why_unsupervised(rendered, rendered) == ""
    first = rendered.loss_mask.index(True)
    assert why_unsupervised(rendered, cut) == (
        f"no token is learnt: the first one stands at {first}, the record is cut at 10 tokens"
    )
    assert "weight 0" in why_unsupervised(cut, cut)
