from __future__ import annotations

import pytest

from luthier.evaluation.metrics.scores import TEXT_METRICS, is_binary, score_answer


def test_score_answer_gives_the_scores_of_every_metric() -> None:
    scores = score_answer(["EXACT_MATCH", "FIELD_MATCH"], '{"a": 1}', '{"a": 1.0}')
    assert scores == {
        "exact_match": 0.0,
        "field_match.field.a": 1.0,
        "field_match.fields": 1.0,
        "field_match.record": 1.0,
        "field_match.parsed": 1.0,
    }
    assert score_answer([], "a", "a") == {}


def test_score_answer_names_an_unknown_metric_and_those_known() -> None:
    with pytest.raises(ValueError, match=r"EXACT_MATCH, FIELD_MATCH, got 'BLEU'"):
        score_answer(["EXACT_MATCH", "BLEU"], "a", "a")


def test_is_binary_holds_for_exactly_the_scores_that_are_right_or_wrong() -> None:
    half_right = score_answer(list(TEXT_METRICS), '{"a": 1, "b": 1}', '{"a": 1, "b": 2}')
    assert {name for name in half_right if not is_binary(name)} == {"field_match.fields"}
    assert all(score in {0.0, 1.0} for name, score in half_right.items() if is_binary(name))
    assert not is_binary("perplexity")
