"""Graders: what each makes of an answer; that a score is in its range, and an error never one."""

from __future__ import annotations

import json
import math
import pickle
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.grading.grader_messages import (
    graded,
    json_match,
    multi,
    number_match,
    regex,
    remote,
    reward_model,
    similarity,
    string_check,
)

from luthier.errors import Reason
from luthier.grading.asked import remote_graders, reward_model_names
from luthier.grading.checks import grader_violations
from luthier.grading.graders import ReadGrader
from luthier.grading.outcomes import GradingError, Sample
from luthier.v1.grader_pb2 import Grader, ScoreRange


def item(answer: Any) -> str:
    return json.dumps({"answer": answer})


@pytest.mark.parametrize(
    ("operation", "text", "reference", "score"),
    [
        ("EQ", "Yes", "Yes", 1.0),
        ("EQ", "Yes", "yes", 0.0),
        ("EQ", "Yes ", "Yes", 0.0),
        ("NE", "Yes", "yes", 1.0),
        ("NE", "yes", "yes", 0.0),
        ("LIKE", "it is yes", "yes", 1.0),
        ("LIKE", "it is Yes", "yes", 0.0),
        ("LIKE", "a%b", "%", 1.0),
        ("LIKE", "ab", "%", 0.0),
        ("ILIKE", "it is YES", "yes", 1.0),
        ("ILIKE", "STRASSE", "straße", 1.0),
        ("ILIKE", "no", "yes", 0.0),
        ("EQ", "", "", 1.0),
    ],
)
def test_string_check_has_openais_meaning(operation: str, text: str, reference: str, score: float) -> None:
    assert graded(string_check(operation), text, item(reference)).score == score


@pytest.mark.parametrize("operation", ["LIKE", "ILIKE"])
def test_an_empty_reference_is_found_in_nothing(operation: str) -> None:
    grade = graded(string_check(operation), "any", item(""))
    assert grade.score is None
    assert grade.error is not None
    assert grade.error.reason == Reason.GRADER_INPUT_INVALID


def test_text_similarity_measures() -> None:
    assert graded(similarity("FUZZY_MATCH"), "abc", item("abd")).score == pytest.approx(2 / 3)
    assert graded(similarity("ROUGE_L"), "a b c", item("a x c")).score == pytest.approx(2 / 3)


RECORD = {"amount": 12.5, "currency": "EUR", "tags": ["a", "b"]}


@pytest.mark.parametrize(
    ("fields", "answer", "score"),
    [
        ({}, RECORD, 1.0),
        ({}, {**RECORD, "currency": "USD"}, 2 / 3),
        ({}, {**RECORD, "more": 1}, 1.0),
        ({"whole": True}, RECORD, 1.0),
        ({"whole": True}, {**RECORD, "more": 1}, 0.0),
        ({"whole": True}, {**RECORD, "currency": "USD"}, 0.0),
        ({"fields": ["amount", "tags"]}, {"amount": 12.50, "tags": ["a", "b"]}, 1.0),
        ({"fields": ["amount", "tags"]}, {"amount": 12.50, "tags": ["b", "a"]}, 0.5),
        ({"fields": ["amount", "tags"], "whole": True}, {"amount": 12.5, "tags": []}, 0.0),
        ({"fields": ["amount"], "whole": True}, {"amount": 12.5, "more": 1}, 1.0),
    ],
)
def test_json_match_compares_fields(fields: dict[str, Any], answer: Any, score: float) -> None:
    grade = graded(json_match(**fields), json.dumps(answer), item(RECORD))
    assert grade.score == pytest.approx(score)


@pytest.mark.parametrize("answer", ["", "no", "[1]", "{" * 10_000, '{"amount":'])
def test_json_match_of_an_answer_that_is_no_object_is_wrong(answer: str) -> None:
    assert graded(json_match(), answer, item(RECORD)).score == 0.0


@pytest.mark.parametrize(
    ("fields", "reference", "said"),
    [
        ({}, "no", "the reference must be a JSON object with a field"),
        ({}, [1], "the reference must be a JSON object with a field"),
        ({}, {}, "the reference must be a JSON object with a field"),
        ({"fields": ["amount", "size"]}, RECORD, "the reference has no field 'size'"),
    ],
)
def test_json_match_of_a_reference_that_does_not_suit_is_an_error(
    fields: dict[str, Any], reference: Any, said: str
) -> None:
    grade = graded(json_match(**fields), json.dumps(RECORD), item(reference))
    assert grade.score is None
    assert grade.error is not None
    assert said in grade.error.message


@pytest.mark.parametrize(
    ("fields", "text", "reference", "score"),
    [
        ({}, "so it is 1,234.50 in all", 1234.5, 1.0),
        ({}, "so it is 1,234.50, or 7", 1234.5, 0.0),
        ({}, "no number", 5, 0.0),
        ({"absolute_tolerance": 0.5}, "10.4", 10, 1.0),
        ({"absolute_tolerance": 0.5}, "10.6", 10, 0.0),
        ({"relative_tolerance": 0.1}, "109", "100", 1.0),
        ({"pattern": r"answer: (\S+)"}, "answer: 3, and 4", 3, 0.0),
        ({"pattern": r"answer: (\d+)"}, "answer: 3, and 4", 3, 1.0),
        ({"pattern": r"answer: (\d+)"}, "answer: 3, no, answer: 5", 5, 1.0),
        ({"pattern": r"answer: (\d+)"}, "3", 3, 0.0),
    ],
)
def test_number_match_finds_the_number(
    fields: dict[str, Any], text: str, reference: Any, score: float
) -> None:
    assert graded(number_match(**fields), text, item(reference)).score == score


@pytest.mark.parametrize("reference", ["", "5 apples", "one", [5], True])
def test_number_match_of_a_reference_that_is_no_number_is_an_error(reference: Any) -> None:
    grade = graded(number_match(), "5", item(reference))
    assert grade.error is not None
    assert "reference must be a number and nothing else" in grade.error.message
    assert grade.score is None


def test_regex_finds_or_matches() -> None:
    assert graded(regex("^yes"), "yes, of course").score == 1.0
    assert graded(regex("yes", full_match=True), "yes, of course").score == 0.0
    assert graded(regex("(?s)<think>.*</think>.+", full_match=True), "<think>\n</think>\nx").score == 1.0


def test_multi_calculates_and_shows_its_parts() -> None:
    inner = multi("(right + close) / 2", right=string_check(), close=similarity("FUZZY_MATCH"))
    grader = multi("0.8 * quality + 0.2 * short", quality=inner, short=regex("^.{0,5}$"))
    grade = graded(grader, "abc", item("abd"))
    assert grade.score == pytest.approx(0.8 * (2 / 3) / 2 + 0.2)
    assert grade.parts == pytest.approx(
        {"quality": 1 / 3, "quality.right": 0.0, "quality.close": 2 / 3, "short": 1.0}
    )


def test_an_error_of_a_part_is_the_error_of_the_whole() -> None:
    grader = multi("0 * a + b", a=string_check(reference="{{item.missing}}"), b=regex("x"))
    grade = graded(grader, "x", item("y"))
    assert (grade.score, dict(grade.parts)) == (None, {})
    assert grade.error is not None
    assert grade.error.message.startswith("grader a: reference names {{item.missing}}")
    assert grade.error.reason == Reason.TEMPLATE_FIELD_MISSING


def test_errors_name_the_grader() -> None:
    grader = string_check(reference="{{item.missing}}")
    grade = graded(grader, "x")
    assert grade.error is not None
    assert grade.error.message.startswith("grader string_check: reference names")
    grader.name = "right"
    grade = graded(grader, "x")
    assert grade.error is not None
    assert grade.error.message.startswith("grader right: reference names")
    deep = graded(multi("a", a=multi("b", b=grader)), "x")
    assert deep.error is not None
    assert deep.error.message.startswith("grader a.b: reference names")


@pytest.mark.parametrize(
    ("calculate_output", "limits", "score", "reason"),
    [
        ("a + 1", None, None, Reason.SCORE_OUT_OF_RANGE),
        ("a - 2", None, None, Reason.SCORE_OUT_OF_RANGE),
        ("a + 1", ScoreRange(min=0, max=2), 2.0, None),
        ("a - 2", ScoreRange(min=-1, max=0), -1.0, None),
        ("a / 0", None, None, Reason.SCORE_NOT_FINITE),
        ("0.1 * a + 0.2 * a + 0.7 * a", None, 1.0, None),
        ("a + 0.00000000001", None, 1.0, None),
    ],
)
def test_multi_keeps_its_range(
    calculate_output: str, limits: ScoreRange | None, score: float | None, reason: Reason | None
) -> None:
    grader = multi(calculate_output, a=regex("x"))
    if limits is not None:
        grader.multi.range.CopyFrom(limits)
    grade = graded(grader, "x")
    assert grade.score == score
    assert (grade.error and grade.error.reason) == reason


def test_remote_scores_are_taken_by_path() -> None:
    grader = multi("a + inner", a=remote(), inner=multi("b", b=remote("localhost:2")))
    grader.multi.range.CopyFrom(ScoreRange(min=0, max=2))
    assert [(path, one.address) for path, one in remote_graders(grader)] == [
        ("a", "127.0.0.1:1"),
        ("inner.b", "localhost:2"),
    ]
    assert graded(grader, "x", remote_scores={"a": 0.25, "inner.b": 0.5}).score == 0.75
    assert [path for path, _ in remote_graders(remote())] == [""]


@pytest.mark.parametrize(
    ("outcome", "reason"),
    [
        (math.nan, Reason.SCORE_NOT_FINITE),
        (math.inf, Reason.SCORE_NOT_FINITE),
        (1.5, Reason.SCORE_OUT_OF_RANGE),
        (GradingError(Reason.REWARD_FAILED, "it says no"), Reason.REWARD_FAILED),
    ],
)
def test_what_is_wrong_with_a_remote_score_is_an_error(outcome: Any, reason: Reason) -> None:
    grade = graded(multi("a", a=remote()), "x", remote_scores={"a": outcome})
    assert grade.score is None
    assert grade.error is not None
    assert grade.error.reason == reason
    assert grade.error.message.startswith("grader a: ")


def test_values_of_reward_models_are_taken_by_path_as_they_are() -> None:
    assert graded(reward_model(), "x", values={"": -7.25}).score == -7.25
    grader = multi("a + inner", a=reward_model(), inner=multi("2 * b", b=reward_model("m/2"), c=regex("x")))
    for one in (grader, grader.multi.graders["inner"]):
        one.multi.range.CopyFrom(ScoreRange(min=-100, max=100))
    grade = graded(grader, "x", values={"a": 3.5, "inner.b": -20.0})
    assert grade.score == -36.5
    assert grade.parts == {"a": 3.5, "inner": -40.0, "inner.b": -20.0, "inner.c": 1.0}
    assert list(reward_model_names(grader, "grader")) == [
        ("grader.multi.graders['a'].reward_model.model", "projects/default/models/judge"),
        ("grader.multi.graders['inner'].multi.graders['b'].reward_model.model", "m/2"),
    ]
    assert list(remote_graders(grader)) == []


def test_an_answer_without_a_value_is_an_error_of_its_grader() -> None:
    why = GradingError(Reason.SEQUENCE_TOO_LONG, "it is too long")
    grade = graded(multi("a", a=reward_model()), "x", values={"a": why})
    assert grade.score is None
    assert grade.error is not None
    assert (grade.error.reason, grade.error.message) == (Reason.SEQUENCE_TOO_LONG, "grader a: it is too long")


def test_a_value_beyond_the_range_of_a_multi_grader_is_an_error() -> None:
    grade = graded(multi("a", a=reward_model()), "x", values={"a": 1.5})
    assert grade.error is not None
    assert grade.error.reason == Reason.SCORE_OUT_OF_RANGE


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_an_error(value: float) -> None:
    for grader, path, label in (
        (reward_model(), "", "reward_model"),
        (multi("a", a=reward_model()), "a", "a"),
    ):
        grade = graded(grader, "x", values={path: value})
        assert grade.score is None
        assert grade.error is not None
        assert grade.error.reason == Reason.SCORE_NOT_FINITE
        assert grade.error.message == (
            f"grader {label}: the value that projects/default/models/judge gives must be finite, got {value}"
        )


TEXTS = st.text(max_size=40)
LEAVES: st.SearchStrategy[Grader] = st.one_of(
    st.builds(
        string_check,
        st.sampled_from(["EQ", "NE", "LIKE", "ILIKE"]),
        st.sampled_from(["{{item.answer}}", "x", "{{item.none}}"]),
    ),
    st.builds(similarity, st.sampled_from(["FUZZY_MATCH", "BLEU", "GLEU", "ROUGE_1", "ROUGE_3", "ROUGE_L"])),
    st.builds(regex, st.sampled_from(["a", "^$", "(x|y)+", "[0-9]"])),
    st.builds(lambda whole: json_match(whole=whole), st.booleans()),
    st.builds(lambda tolerance: number_match(relative_tolerance=tolerance), st.floats(0, 10)),
)
FORMULAS = st.sampled_from(
    ["a", "a / b", "a - b", "log(a)", "a ^ b * 3", "max(a, b) * 0.5", "exp(a + 800 * b)"]
)


@settings(deadline=None, max_examples=300)
@given(
    LEAVES,
    LEAVES,
    FORMULAS,
    TEXTS,
    st.one_of(TEXTS, st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.none()),
)
def test_a_score_is_in_its_range_and_an_error_is_never_a_score(
    left: Grader, right: Grader, formula: str, text: str, answer: Any
) -> None:
    grader = multi(formula, a=left, b=right)
    assert list(grader_violations(grader, "grader")) == [] or "b" not in formula
    grade = ReadGrader(grader).grade(Sample(item_json=item(answer), output_text=text))
    assert (grade.score is None) == (grade.error is not None)
    assert grade.score is None or 0.0 <= grade.score <= 1.0
    assert all(0.0 <= part <= 1.0 for part in grade.parts.values())


def test_an_error_is_the_same_in_another_process() -> None:
    error = pickle.loads(pickle.dumps(GradingError(Reason.REWARD_SERVICE_UNAVAILABLE, "away")))
    assert (error.reason, error.message, str(error)) == (Reason.REWARD_SERVICE_UNAVAILABLE, "away", "away")
