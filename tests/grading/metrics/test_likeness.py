"""chrF, BLEU and ROUGE of an answer, held against sacrebleu's own and against rouge-score's values."""

from __future__ import annotations

import pytest
from sacrebleu import sentence_bleu, sentence_chrf

from luthier.grading.metrics.bleu import bleu
from luthier.grading.metrics.chrf import chrf
from luthier.grading.metrics.rouge import rouge
from luthier.grading.metrics.said import Said

PAIRS = [
    ("the cat sat on the mat", "the cat is on the mat"),
    ("a short answer", "a much longer answer than that, which goes on and on"),
    ("", "something"),
    ("the same text", "the same text"),
    ("nothing in common", "42"),
]


def said(text: str, reference: str) -> Said:
    return Said(text=text, reference=reference)


@pytest.mark.parametrize(("text", "reference"), PAIRS)
def test_chrf_is_that_of_sacrebleu_as_a_share(text: str, reference: str) -> None:
    (value,) = chrf(said(text, reference)).values()
    assert value == pytest.approx(sentence_chrf(text, [reference]).score / 100)
    assert 0 <= value <= 1


@pytest.mark.parametrize(("text", "reference"), PAIRS)
def test_bleu_is_that_of_sacrebleu_as_a_share(text: str, reference: str) -> None:
    (value,) = bleu(said(text, reference)).values()
    assert value == pytest.approx(sentence_bleu(text, [reference], use_effective_order=True).score / 100)
    assert 0 <= value <= 1


def test_rouge_is_that_of_rouge_score() -> None:
    """rouge_score 0.1.2: RougeScorer(["rouge1", "rouge2", "rougeL"]).score(reference, text), F-measures."""
    assert rouge(said(*PAIRS[0])) == pytest.approx(
        {"rouge.one": 5 / 6, "rouge.two": 3 / 5, "rouge.longest": 5 / 6}
    )
    assert rouge(said("the mat the cat", "the cat the mat"))["rouge.longest"] == pytest.approx(0.5)


def test_one_word_has_no_two_in_a_row() -> None:
    assert rouge(said("red", "red")) == {"rouge.one": 1.0, "rouge.longest": 1.0}


def test_ways_to_write_one_character_are_alike() -> None:
    for metric in (chrf, bleu, rouge):
        assert set(metric(said("Zu\u0308rich ist gross", "Z\u00fcrich ist gross")).values()) == {1.0}


@pytest.mark.parametrize("reference", ["", " \n"])
def test_a_reference_of_nothing_suits_none_of_them(reference: str) -> None:
    for metric in (chrf, bleu, rouge):
        with pytest.raises(ValueError, match="reference must have a"):
            metric(said("text", reference))
