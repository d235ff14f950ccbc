"""Which records training records repeat: exactly, but for their form, or by runs of words; and which they do not."""

from __future__ import annotations

import pytest

from luthier.evaluation.worker.overlap import MOST_SHARED, Held, Kind, Overlaps, Place, Words

PLACE = Place(version="d/v1", filename="train.jsonl", line=7)
LONG = (
    "The board of Nordwind said on Tuesday that revenue for the third quarter rose to 412 million euros "
    "while costs fell by a tenth against the year before"
)


def words(question: str, answer: str = "yes", record_id: str = "a", system: str = "") -> Words:
    return Words(record_id=record_id, question=question, answer=answer, system=system)


def held(asked: Words, *shown: Words) -> Held | None:
    overlaps = Overlaps([words("something else altogether", record_id="other"), asked])
    for number, one in enumerate(shown, start=1):
        overlaps.show(one, Place(version="d/v1", filename="train.jsonl", line=number))
    assert set(overlaps.held) <= {1}
    return overlaps.held.get(1)


def test_the_same_record_is_exact() -> None:
    assert held(words("what?"), words("what?")) == Held(
        kind=Kind.EXACT, overlap=1.0, place=Place(version="d/v1", filename="train.jsonl", line=1)
    )


@pytest.mark.parametrize(
    ("question", "answer"),
    [("WHAT  is\nthis?!", "Yes."), ("what is this", "yes"), ("\uff37hat is this", "\u00a0yes")],
)
def test_another_form_of_the_same_words_is_normalised(question: str, answer: str) -> None:
    found = held(words("What is this?", "yes"), words(question, answer, "b"))
    assert found is not None
    assert found.kind == Kind.NORMALISED


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("What is this?", "no"),
        ("What is that?", "yes"),
        ("yes", "What is this?"),
    ],
)
def test_other_words_are_nothing(question: str, answer: str) -> None:
    assert held(words("What is this?", "yes"), words(question, answer, "b")) is None


@pytest.mark.parametrize(
    ("one", "other"), [("3 + 2", "3 - 2"), ("is 12.5 it", "is 125 it"), ("at -5", "at 5"), ("a > b", "a < b")]
)
def test_a_sign_that_changes_what_is_said_is_not_form(one: str, other: str) -> None:
    assert held(words(one), words(other, record_id="b")) is None


def test_records_of_no_words_are_not_all_alike() -> None:
    assert held(words("?", "!"), words("...", "?", "b")) is None


def test_half_of_the_runs_of_words_in_one_record_is_enough() -> None:
    part = " ".join(LONG.split()[:22])
    found = held(words(LONG, ""), words(f"{part} and then nothing more", "", "b"))
    assert found is not None
    assert found.kind == Kind.NGRAM
    num_runs = len(LONG.split()) - 12
    assert found.overlap == pytest.approx(10 / num_runs)
    less = " ".join(LONG.split()[:18])
    assert held(words(LONG, ""), words(less, "", "b")) is None


def test_two_records_do_not_make_a_half_together() -> None:
    first, last = " ".join(LONG.split()[:18]), " ".join(LONG.split()[-18:])
    assert held(words(LONG, ""), words(first, "", "b"), words(last, "", "c")) is None


def test_a_phrase_shorter_than_a_run_says_nothing() -> None:
    assert (
        held(words("one two three four five", "six"), words("one two three four five", "seven", "b")) is None
    )


def test_the_strictest_that_holds_is_told_and_the_first_place_of_it() -> None:
    asked = words(LONG, "yes", "a")
    found = held(
        asked, words(LONG, "no", "b"), words(LONG.upper(), "yes", "c"), words(LONG, "yes", "a"), asked
    )
    assert found is not None
    assert (found.kind, found.place.line) == (Kind.EXACT, 3)


def test_two_records_of_the_evaluation_are_both_found() -> None:
    overlaps = Overlaps([words("What is this?", record_id="a"), words("what is this", record_id="b")])
    overlaps.show(words("What is this?", record_id="a"), PLACE)
    assert {row: one.kind for row, one in overlaps.held.items()} == {0: Kind.EXACT, 1: Kind.NORMALISED}


def names(start: int, count: int) -> str:
    return " ".join(f"word{number}" for number in range(start, start + count))


@pytest.mark.parametrize("num_records", [3, 24, 400])
def test_a_template_that_records_share_is_not_their_own(num_records: int) -> None:
    asked = [words(f"{LONG} {names(number * 20, 15)}", "", str(number)) for number in range(num_records)]
    overlaps = Overlaps(asked)
    overlaps.show(words(f"{LONG} {names(90_000, 15)}", "", "b"), PLACE)
    assert not overlaps.held
    overlaps.show(words(f"{LONG} {names(20, 15)} at last", "no", "c"), PLACE)
    assert {row: (one.kind, one.overlap) for row, one in overlaps.held.items()} == {1: (Kind.NGRAM, 1.0)}


def test_what_some_records_share_is_their_own() -> None:
    """Several questions about one text that was learnt are all contaminated."""
    asked = [words(f"{LONG} question {number}", "", str(number)) for number in range(MOST_SHARED)]
    others = [words(names(number * 20, 15), "", f"o{number}") for number in range(200)]
    overlaps = Overlaps([*asked, *others])
    overlaps.show(words(LONG, "", "b"), PLACE)
    assert sorted(overlaps.held) == list(range(MOST_SHARED))


def test_a_run_of_words_of_a_training_record_costs_few_steps_whatever_is_shared() -> None:
    asked = [words(f"{LONG} {names(number * 20, 15)}", "", str(number)) for number in range(1_000)]
    overlaps = Overlaps(asked)
    assert max(map(len, overlaps._runs.values())) <= MOST_SHARED


def test_the_same_words_under_another_system_turn_are_the_same() -> None:
    found = held(words("What is this?", system="Be brief."), words("What is this?", "yes", "b", "Be kind."))
    assert found is not None
    assert found.kind == Kind.NORMALISED


def test_a_system_turn_that_alone_tells_records_apart_is_compared() -> None:
    """It holds what is asked about: the text whose mood is to be named."""
    texts = ("I love it.", "Quite good!", "The best.")
    asked = [words("Which mood?", "glad", text, text) for text in texts]
    overlaps = Overlaps(asked)
    overlaps.show(words("Which mood?", "glad", "b", "All is well."), PLACE)
    assert not overlaps.held
    overlaps.show(words("Which mood?", "glad", "c", "quite GOOD"), PLACE)
    assert {row: one.kind for row, one in overlaps.held.items()} == {1: Kind.NORMALISED}


SHORT = [("Which mood?", answer, f"A text that is {answer}") for answer in ("glad", "sad", "angry")]


def test_a_question_about_texts_in_system_turns_is_the_same_about_the_same_text_alone() -> None:
    """No two records of the evaluation have one answer."""
    overlaps = Overlaps([words(question, answer, answer, text) for question, answer, text in SHORT])
    for _, answer, _ in SHORT:
        overlaps.show(words("Which mood?", answer, "b", "Another text altogether"), PLACE)
    assert not overlaps.held
    overlaps.show(words("which MOOD", "sad", "c", "a text that is SAD."), PLACE)
    assert {row: one.kind for row, one in overlaps.held.items()} == {1: Kind.NORMALISED}


@pytest.mark.parametrize("num_texts", [2, 40])
def test_a_long_question_about_several_texts_is_no_records_own(num_texts: int) -> None:
    asked = [words(LONG, f"no {number}", f"t{number}", f"text {number}") for number in range(num_texts)]
    others = [words(names(number * 20, 15), "", f"o{number}") for number in range(40)]
    answered = words(LONG, names(90_000, 20), "long", "a text with a long answer")
    overlaps = Overlaps([*asked, *others, answered])
    overlaps.show(words(LONG, "another answer", "b", "another text"), PLACE)
    assert not overlaps.held
    overlaps.show(words("Say something.", names(90_000, 20), "c", "another text"), PLACE)
    assert {row: one.kind for row, one in overlaps.held.items()} == {num_texts + 40: Kind.NGRAM}
