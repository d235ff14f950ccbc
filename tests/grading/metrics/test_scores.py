from __future__ import annotations

import pytest

from luthier.grading.metrics.measured import TEXT_METRICS, score_answer
from luthier.grading.metrics.said import Said
from luthier.grading.metrics.scores import ScoreKind, find_score, is_right, score_named


def test_score_answer_gives_the_scores_of_every_metric() -> None:
    scores = score_answer(["EXACT_MATCH", "FIELD_MATCH"], Said(text='{"a": 1}', reference='{"a": 1.0}'))
    assert scores == {
        "exact_match": 0.0,
        "field_match.field.a": 1.0,
        "field_match.fields": 1.0,
        "field_match.record": 1.0,
        "field_match.parsed": 1.0,
    }
    assert score_answer([], Said(text="a", reference="a")) == {}


def test_score_answer_names_an_unknown_metric_and_those_known() -> None:
    with pytest.raises(ValueError, match=r"EXACT_MATCH, FIELD_MATCH, .*, got 'METEOR'"):
        score_answer(["EXACT_MATCH", "METEOR"], Said(text="a", reference="a"))


def test_every_score_says_what_values_it_has_and_which_are_better() -> None:
    half_right = score_answer(list(TEXT_METRICS), Said(text='{"a": 1, "b": 1}', reference='{"a": 1, "b": 2}'))
    fractions = {name for name in half_right if score_named(name).kind is ScoreKind.FRACTION}
    likeness = {"chrf", "bleu", "rouge.one", "rouge.two", "rouge.longest"}
    assert fractions == {"field_match.fields", *likeness}
    assert all(0 < half_right[name] < 1 for name in likeness)
    binary = {name: score for name, score in half_right.items() if name not in fractions}
    assert all(score_named(name).kind is ScoreKind.BINARY for name in binary)
    assert set(binary.values()) <= {0.0, 1.0}
    assert all(score_named(name).higher_is_better for name in half_right)
    assert score_named("perplexity").kind is ScoreKind.REAL
    assert not score_named("perplexity").higher_is_better


@pytest.mark.parametrize(
    ("scores", "said"),
    [
        ({"exact_match": 1.0}, True),
        ({"field_match.record": 0.0, "field_match.fields": 0.9}, False),
        ({"exact_match": 0.0, "field_match.record": 1.0}, False),
        ({"field_match.parsed": 1.0, "field_match.field.record": 1.0}, None),
        ({}, None),
    ],
)
def test_a_whole_answer_is_right_where_a_score_says_so(scores: dict[str, float], said: bool | None) -> None:
    assert is_right(scores) is said


@pytest.mark.parametrize("name", ["meteor", "field_match", "field_match.other", "exact_match.x", ""])
def test_a_score_that_nobody_declared_is_neither_binary_nor_anything_else(name: str) -> None:
    assert find_score(name) is None
    with pytest.raises(ValueError, match=r"score must be one of exact_match, .*, got"):
        score_named(name)
