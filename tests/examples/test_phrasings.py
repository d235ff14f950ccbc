from __future__ import annotations

import re
import string

import pytest
from phrasings import DISTRACTORS, TEST_PHRASINGS, TRAIN_PHRASINGS, fill, shows

FIELDS = {
    "period": "Q3 2025",
    "revenue": "$4.25 billion",
    "eps": "$1.40",
    "guided": "raised",
}
NAMES = {"company": "Hexworth Steel", "possessive": "Hexworth Steel's"}
FIGURES = {
    "prior": "$3.75 billion",
    "consensus": "$1.35",
    "segment": "cloud",
    "segment_revenue": "$2.5 billion",
}


def words(phrasing: str) -> list[str]:
    """The words of a phrasing as a reader sees them, its slots aside."""
    text = re.sub(r"\[\w+:|[\[\]|]|\{\w+\}", " ", phrasing)
    return text.translate(str.maketrans("", "", string.punctuation)).lower().split()


def test_phrasings_of_the_test_are_others_than_those_of_training() -> None:
    assert len(set(TRAIN_PHRASINGS)) >= 30
    assert len(set(TEST_PHRASINGS)) >= 10
    assert {tuple(words(one)) for one in TRAIN_PHRASINGS}.isdisjoint(
        tuple(words(one)) for one in TEST_PHRASINGS
    )


@pytest.mark.parametrize("phrasing", TRAIN_PHRASINGS + TEST_PHRASINGS)
@pytest.mark.parametrize("missing", [None, *FIELDS])
def test_fill_states_exactly_what_is_known(phrasing: str, missing: str | None) -> None:
    stated = {name: text for name, text in FIELDS.items() if name != missing}
    text = fill(phrasing, NAMES | stated)
    for name, value in FIELDS.items():
        assert text.count(value) == (0 if name == missing else 1), (name, text)
    assert "Hexworth Steel" in text
    assert not any(value in text for value in FIGURES.values())


@pytest.mark.parametrize("phrasing", TRAIN_PHRASINGS + TEST_PHRASINGS)
def test_fill_writes_clean_sentences(phrasing: str) -> None:
    for missing in (None, *FIELDS):
        stated = {name: text for name, text in FIELDS.items() if name != missing}
        known = {name: text for name, text in FIGURES.items() if missing is None}
        text = fill(phrasing, NAMES | stated | known)
        assert not re.search(r"[\[\]{}|]| [.,;:]|[.,;:][.,;:]|\(\)|[,;:]$", text), text
        assert text[-1] == ".", text
        assert text[0].isupper() or text[0] == "$", text
        assert not re.search(r"\. [a-z]", text), text


@pytest.mark.parametrize("phrasing", TRAIN_PHRASINGS + TEST_PHRASINGS)
def test_every_phrasing_has_a_place_for_a_distractor(phrasing: str) -> None:
    known = [name for name in DISTRACTORS if shows(phrasing, name)]
    assert known
    text = fill(phrasing, NAMES | FIELDS | FIGURES)
    for name in known:
        assert FIGURES[name] in text


def test_fill_refuses_a_slot_without_value() -> None:
    with pytest.raises(KeyError, match="company"):
        fill("{company} reported.", {})
