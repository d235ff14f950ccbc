"""calculate_output: what it calculates, what it cannot, and that nothing else is in it."""

from __future__ import annotations

import ast
import math
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.errors import Reason
from luthier.grading.expressions import FUNCTIONS, MAX_CHARACTERS, may_be_called, parsed
from luthier.grading.outcomes import GradingError

SCORES = {"a": 0.5, "b": 0.25}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("(a + b) / 2", 0.375),
        ("a - b", 0.25),
        ("-a ^ 2", -0.25),
        ("2 ^ 3 ^ 2", 512.0),
        ("2 ^ -1", 0.5),
        ("2 * a ^ 2", 0.5),
        ("min(a, b, 1)", 0.25),
        ("max(a, b)", 0.5),
        ("abs(b - a)", 0.25),
        ("floor(1.9) + ceil(1.1)", 3.0),
        ("exp(0) + sqrt(4) + log(1)", 3.0),
        (".5e1", 5.0),
        ("1.", 1.0),
        ("+a", 0.5),
        ("a\n + b", 0.75),
    ],
)
def test_value_is_what_openai_documents(text: str, value: float) -> None:
    assert parsed(text).value(SCORES) == pytest.approx(value)


def test_parsed_names_the_graders_that_it_needs() -> None:
    assert parsed("min(a, b) * a + 1").names == {"a", "b"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "1 to 1000 characters"),
        ("a" * (MAX_CHARACTERS + 1), "1 to 1000 characters"),
        ("a.real", r"got '.real' at character 1"),
        ("a[0]", r"got '\[0\]'"),
        ("__import__('os')", "at character 11"),
        ("a == b", "at character 2"),
        ("a; b", "at character 1"),
        ("a % b", "at character 2"),
        ("a // b", "alone, got 'a // b'"),
        ("a if b else a", "alone, got"),
        ("lambda", "must be a calculation"),
        ("lambda_(a)", "functions are min, max"),
        ("(a, b)", "alone, got"),
        ("a b", "must be a calculation"),
        ("a +", "must be a calculation"),
        ("pow(a, b)", "functions are min, max"),
        ("abs(a, b)", "abs takes one argument, got 2"),
        ("min(a)", "min takes two arguments or more, got 1"),
        ("min(*a)", "min takes two arguments or more"),
        ("min(*a, b)", "alone, got"),
        ("abs", r"abs is a function: write abs\(...\)"),
        ("a(b)", "functions are"),
        ("(min)(a, b)(a)", "alone, got"),
        ("True", "alone, got 'True'"),
        ("1j", "at character 0"),
        ("1_000", "at character 0"),
        ("0x10", "at character 0"),
        ("9e999", "numbers must be finite"),
        ("9" * 900, "numbers must be finite"),
        ("a\x00", "at character 1"),
        ("a\u00b2", "at character 1"),
        ("e\u0301", "at character 1"),
        ("(" * 40 + "a" + ")" * 40 + "(", "must be a calculation"),
        ("-" * 900 + "a", "at most 32 deep"),
        ("+".join(["a"] * 300), "deep"),
        ("min(" + ",".join(["a"] * 300) + ")", "at most 200 parts"),
        ("(" * 499 + "a" + ")" * 499, "must be a calculation"),
    ],
)
def test_parsed_refuses_what_is_no_calculation(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parsed(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a / (b - b)", "division by zero"),
        ("log(0)", "cannot be calculated"),
        ("sqrt(0 - 1)", "cannot be calculated"),
        ("(0 - 8) ^ 0.5", "cannot be calculated"),
        ("exp(1000)", "cannot be calculated"),
        ("10 ^ 308 * 10", "is inf"),
        ("10 ^ 308 * 10 - 10 ^ 308 * 10", "is nan"),
        ("floor(10 ^ 308 * 10)", "cannot be calculated"),
    ],
)
def test_value_that_is_no_number_is_an_error_with_the_scores(text: str, said: str) -> None:
    with pytest.raises(GradingError, match=said) as caught:
        parsed(text).value(SCORES)
    assert caught.value.reason == Reason.SCORE_NOT_FINITE
    if "b" in text:
        assert "b = 0.25" in caught.value.message


@given(st.text(alphabet="ab01.+-*/^(), minexplog", max_size=60))
def test_parsed_reads_or_refuses_and_never_fails_otherwise(text: str) -> None:
    try:
        expression = parsed(text)
    except ValueError:
        return
    try:
        value = expression.value(dict.fromkeys(expression.names, 0.5))
    except GradingError:
        return
    assert math.isfinite(value)


@given(st.text(max_size=200))
def test_parsed_refuses_any_other_text_by_words(text: str) -> None:
    try:
        expression = parsed(text)
    except ValueError as error:
        assert str(error).startswith(("must", "functions", "numbers", "abs", *FUNCTIONS))  # noqa: PT017
        return
    assert all(isinstance(node, ast.expr) for node in [expression.root])


@pytest.mark.parametrize("text", ["1^" * 490 + "1", "((((" * 240, "a^a^" * 240 + "a", "9" * 1000, "-(" * 330])
def test_parsed_takes_no_time(text: str) -> None:
    began = time.process_time()
    with pytest.raises(ValueError, match="must"):
        parsed(text)
    assert time.process_time() - began < 1.0


@pytest.mark.parametrize(
    ("name", "may"),
    [
        ("a", True),
        ("_b2", True),
        ("min", False),
        ("if", False),
        ("A", False),
        ("1a", False),
        ("a.b", False),
        ("", False),
    ],
)
def test_may_be_called_what_an_expression_can_say(name: str, may: bool) -> None:
    assert may_be_called(name) is may
