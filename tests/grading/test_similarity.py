"""Measures of likeness against the libraries that are their authority.

`similarity_values.json` holds what these gave on the same texts: rapidfuzz 3.14.6 (`fuzz.ratio`), sacrebleu 2.6.0 (BLEU
of a sentence with effective_order), NLTK 3.10.4 (`sentence_gleu` over the tokens of sacrebleu's Tokenizer13a) and
rouge-score 0.1.2 (f-measure, no stemmer).
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.errors import Reason
from luthier.grading.outcomes import GradingError
from luthier.grading.similarity import MEASURES, similarity

VALUES = json.loads(Path(__file__).with_name("similarity_values.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("entry", VALUES, ids=lambda entry: entry["text"][:20])
def test_values_are_those_of_the_libraries(entry: dict[str, object]) -> None:
    scores = entry["scores"]
    assert isinstance(scores, dict)
    assert len(scores) >= 8
    for measure, value in scores.items():
        assert similarity(measure, str(entry["text"]), str(entry["reference"])) == pytest.approx(
            value, abs=1e-9
        ), measure


def test_known_values() -> None:
    # By hand: runs of one to four words, 5 + 3 + 2 + 1 of 6 + 5 + 4 + 3 are right.
    text, reference = "the cat sat on the mat", "the cat is on the mat"
    assert similarity("GLEU", text, reference) == pytest.approx((5 + 3 + 1 + 0) / 18)
    assert similarity("ROUGE_1", text, reference) == pytest.approx(5 / 6)
    assert similarity("ROUGE_2", text, reference) == pytest.approx(3 / 5)
    assert similarity("ROUGE_L", text, reference) == pytest.approx(5 / 6)
    assert similarity("FUZZY_MATCH", "abc", "abd") == pytest.approx(2 / 3)
    # rouge-score keeps none of these letters; here they are words like others.
    assert similarity("ROUGE_1", "größe ändern", "Größe Ändern!") == 1.0


@pytest.mark.parametrize("measure", MEASURES)
def test_same_texts_are_wholly_alike_and_an_empty_answer_not_at_all(measure: str) -> None:
    text = "six words stand in this sentence"
    assert similarity(measure, text, text) == 1.0
    assert similarity(measure, "", text) == 0.0


@pytest.mark.parametrize("measure", [name for name in MEASURES if name != "FUZZY_MATCH"])
def test_a_reference_that_nothing_can_match_is_an_error(measure: str) -> None:
    with pytest.raises(GradingError, match="reference must have") as caught:
        similarity(measure, "a", " \n")
    assert caught.value.reason == Reason.GRADER_INPUT_INVALID


def test_a_reference_too_short_for_its_measure_is_an_error() -> None:
    with pytest.raises(GradingError, match="reference must have 3 words in a row"):
        similarity("ROUGE_3", "one two three", "one two")


@settings(deadline=None)
@given(st.sampled_from(sorted(MEASURES)), st.text(max_size=200), st.text(max_size=200))
def test_similarity_is_in_its_range_or_an_error(measure: str, text: str, reference: str) -> None:
    try:
        value = similarity(measure, text, reference)
    except GradingError as error:
        assert error.reason == Reason.GRADER_INPUT_INVALID  # noqa: PT017
        return
    assert 0.0 <= value <= 1.0


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize(
    "text", ["x" * 65_536, "a b " * 16_384, "." * 65_536, "\N{COMBINING ACUTE ACCENT}" * 65_536]
)
def test_the_longest_texts_take_seconds_at_most(measure: str, text: str) -> None:
    began = time.process_time()
    try:
        value = similarity(measure, text[::-1], text)
    except GradingError:
        value = 0.0
    assert 0.0 <= value <= 1.0
    assert time.process_time() - began < 8.0
