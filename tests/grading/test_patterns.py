"""Regular expressions of RE2: bombs are refused or cost nothing."""

from __future__ import annotations

import time

import pytest

from luthier.errors import Reason
from luthier.grading.outcomes import GradingError
from luthier.grading.patterns import parsed


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "1 to 1000 characters"),
        ("a" * 1001, "1 to 1000 characters"),
        ("[", r"missing \]"),
        ("(?=a)", "invalid perl operator"),
        (r"(a)\1", "invalid escape"),
        ("((a{100}){100}){100}", "invalid repetition size"),
        (r"(\pL{50}){15}", "pattern too large"),
        ("a{1001}", "invalid repetition size"),
        ("(" * 500, "missing|nesting"),
    ],
)
def test_parsed_refuses(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parsed(text)


@pytest.mark.parametrize("text", ["(a|aa)+$", "(a+)+$", "(a*)*b", "(.*)(.*)(.*)(.*)x", "(?:a?){300}a{300}"])
def test_bombs_of_other_engines_take_no_time(text: str) -> None:
    began = time.process_time()
    parsed(text).matches("a" * 65_000 + "!", whole=True)
    assert time.process_time() - began < 2.0


def test_matches_finds_or_takes_the_whole() -> None:
    assert parsed("b").matches("abc", whole=False)
    assert not parsed("b").matches("abc", whole=True)
    assert parsed("(?i)É.").matches("xéÿ", whole=False)
    assert parsed("\x00").matches("a\x00", whole=False)


def test_last_group_is_of_the_last_match() -> None:
    pattern = parsed(r"=\s*(\d+)")
    assert pattern.num_groups == 1
    assert pattern.last_group("a = 1, b = 22") == "22"
    assert pattern.last_group("none") is None
    assert parsed("a|(b)").last_group("ba") is None


def test_last_group_looks_at_so_many_matches_alone() -> None:
    pattern = parsed("(a)")
    assert pattern.last_group("a" * 1000) == "a"
    began = time.process_time()
    with pytest.raises(GradingError, match="at most 1000 times") as caught:
        parsed("a(.)[^c]*c|(?:a)").last_group("a" * 65_000)
    assert caught.value.reason == Reason.GRADER_INPUT_INVALID
    assert time.process_time() - began < 5.0
