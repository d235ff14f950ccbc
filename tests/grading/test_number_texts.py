"""Numbers in texts."""

from __future__ import annotations

import time
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.grading.number_texts import is_close, last_number, number_of


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The answer is 42.", "42"),
        ("1 + 1 = 2", "2"),
        ("3-4", "4"),
        ("x = -5", "-5"),
        ("(-5)", "-5"),
        ("it fell to \u22123.5 %", "-3.5"),
        ("$1,234,567.89 in total", "1234567.89"),
        ("one of 1,2,3", "3"),
        ("1,2345", "2345"),
        ("12,34", "34"),
        ("1.5e3", "1500"),
        ("2E-2!", "0.02"),
        (".5", "0.5"),
        ("+7", "7"),
        ("#### 18\n", "18"),
        ("v1.2.3", "3"),
        ("none", None),
        ("", None),
        ("e5", "5"),
        ("٣", None),
        ("1e99999999", None),
        ("9" * 401, None),
    ],
)
def test_last_number_is_found(text: str, number: str | None) -> None:
    assert last_number(text) == (None if number is None else Decimal(number))


@pytest.mark.parametrize(
    ("text", "number"),
    [
        (" 42 ", "42"),
        ("1,234.5", "1234.5"),
        ("1e3", "1000"),
        ("1,2", None),
        ("42 %", None),
        ("a1", None),
        ("", None),
    ],
)
def test_number_of_takes_a_number_alone(text: str, number: str | None) -> None:
    assert number_of(text) == (None if number is None else Decimal(number))


@pytest.mark.parametrize(
    ("found", "right", "absolute", "relative", "close"),
    [
        ("0.30", "0.3", 0.0, 0.0, True),
        ("12345678901234567890", "12345678901234567891", 0.0, 0.0, False),
        ("1.05", "1", 0.05, 0.0, True),
        ("1.0500001", "1", 0.05, 0.0, False),
        ("104", "100", 0.0, 0.05, True),
        ("106", "100", 0.0, 0.05, False),
        ("-96", "-100", 0.0, 0.05, True),
        ("100", "-100", 0.0, 0.05, False),
        ("1", "0", 0.0, 100.0, False),
        ("1e9999", "-1e9999", 0.0, 3.0, True),
    ],
)
def test_is_close_takes_the_greater_tolerance(
    found: str, right: str, absolute: float, relative: float, close: bool
) -> None:
    assert is_close(Decimal(found), Decimal(right), absolute, relative) is close


@given(st.decimals(allow_nan=False, allow_infinity=False, places=4, min_value=-(10**12), max_value=10**12))
def test_any_number_is_found_again(number: Decimal) -> None:
    for text in (f"{number}", f"{number:,}"):
        assert number_of(text) == number
        assert last_number(f"first 7, then: {text}") == number


@pytest.mark.parametrize(
    "text", ["1," * 32_000, "1,234" * 13_000, "9" * 65_000, "-" * 65_000, "1e" * 32_000, "." * 65_000]
)
def test_time_is_linear(text: str) -> None:
    began = time.process_time()
    last_number(text)
    number_of(text)
    assert time.process_time() - began < 2.0
