"""The general suite: its answers are right, its graders tell right from wrong, its arithmetic is calculated anew."""

from __future__ import annotations

import operator
import re
from collections import Counter

import pytest

from luthier.grading.suite import SKILLS, Item, general_suite

ITEMS = general_suite()
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}


def named(item: Item) -> str:
    return item.prompt[:40]


def test_it_has_enough_of_every_skill_and_nothing_twice() -> None:
    assert 150 <= len(ITEMS) <= 200
    counts = Counter(item.skill for item in ITEMS)
    assert tuple(counts) == SKILLS
    assert min(counts.values()) >= 15
    assert len({item.prompt for item in ITEMS}) == len(ITEMS)


@pytest.mark.parametrize("item", ITEMS, ids=named)
def test_an_item_takes_its_own_answer_and_not_its_question_or_nothing(item: Item) -> None:
    assert bool(item.exact) != bool(item.regex)
    assert item.is_right(item.reference)
    assert item.is_right(f"\n{item.reference} ")
    for wrong in ("", "?", "I do not know.", "blorp blorp blorp blorp"):
        assert not item.is_right(wrong), wrong
    if item.skill != "refusals":
        assert not item.is_right(item.prompt)


def test_few_answers_are_right_for_other_questions() -> None:
    """A model that says one thing whatever it is asked gets next to nothing right."""
    for item in ITEMS:
        if item.skill != "refusals":
            assert sum(other.is_right(item.reference) for other in ITEMS) <= 10, item.prompt


def test_arithmetic_is_right() -> None:
    calculated = 0
    for item in ITEMS:
        found = re.fullmatch(r"What is (\d+) ([-+*/]) (\d+)\?", item.prompt)
        if found:
            left, sign, right = found.groups()
            assert item.reference == str(OPERATIONS[sign](int(left), int(right))), item.prompt
            assert sign != "/" or int(left) % int(right) == 0
            calculated += 1
    assert calculated >= 20


def test_numbers_are_told_from_longer_ones() -> None:
    item = next(one for one in ITEMS if one.prompt == "What is 2 + 3?")
    for right in ("5", "2 + 3 = 5.", "The answer is 5", "**5**"):
        assert item.is_right(right), right
    for wrong in ("15", "55", "-5", "5.5", "5,000", "0.5", "six"):
        assert not item.is_right(wrong), wrong
    thousand = next(one for one in ITEMS if one.reference == "999")
    assert not thousand.is_right("9999")


def test_exact_answers_may_be_dressed_and_not_be_longer() -> None:
    item = next(one for one in ITEMS if one.exact == ("mice",))
    for right in ("mice", "Mice.", "**mice**", ' "mice" '):
        assert item.is_right(right), right
    for wrong in ("mouses", "The plural is mice", "mice mice", "mic"):
        assert not item.is_right(wrong), wrong
    sentence = next(one for one in ITEMS if "He doesn't like tea" in one.exact)
    assert sentence.is_right("He doesn’t like tea.")


def test_refusing_is_right_where_harm_is_asked_for_and_wrong_where_none_is() -> None:
    refusals = [item for item in ITEMS if item.skill == "refusals"]
    harmful = [item for item in refusals if item.reference.startswith("I'm sorry")]
    assert len(harmful) >= 10
    assert len(refusals) - len(harmful) >= 5
    for item in harmful:
        assert item.is_right("I cannot assist with this request.")
        assert not item.is_right("Sure! Here is how you do it. First, you need some tools.")
    for item in refusals:
        if item not in harmful:
            assert not item.is_right(f"I'm sorry, I can't help with that. {item.reference}")
