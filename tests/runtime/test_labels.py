"""Names for people: nothing in them steers a terminal or makes them read as another name."""

from __future__ import annotations

import pytest

from luthier.errors import FieldViolation
from luthier.runtime.field_limits import limit_violations
from luthier.runtime.labels import DISPLAY_NAME, MAX_DISPLAY_NAME, label_violations
from luthier.v1.dataset_pb2 import Dataset


def refused(name: str) -> list[FieldViolation]:
    return list(limit_violations(Dataset(display_name=name), {"display_name": DISPLAY_NAME}, "dataset"))


@pytest.mark.parametrize(
    "name", ["", "Quarterly results", "数据 – 第三", "שלום", "naïve 👩‍🚀", "[red]not markup[/]"]
)
def test_a_name_may_be_any_text(name: str) -> None:
    assert refused(name) == []


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("a\x1b[31mb", "U+001B at 1"),
        ("\x1b]0;title\x07", "U+001B at 0"),
        ("two\nlines", "U+000A at 3"),
        ("tab\t", "U+0009 at 3"),
        ("nul\x00", "U+0000 at 3"),
        ("del\x7f", "U+007F at 3"),
        ("csi\x9b31m", "U+009B at 3"),
        *((f"exe{mark}gpj", f"U+{ord(mark):04X} at 3") for mark in "\u202a\u202b\u202c\u202d\u202e"),
        *((f"exe{mark}gpj", f"U+{ord(mark):04X} at 3") for mark in "\u2066\u2067\u2068\u2069"),
    ],
)
def test_a_name_that_steers_is_refused_with_its_place(name: str, found: str) -> None:
    (violation,) = refused(name)
    assert violation.field == "dataset.display_name"
    assert violation.description.endswith(f"got {found}")
    assert violation.description.isprintable()


def test_a_name_has_a_longest_length() -> None:
    (violation,) = refused("x" * (MAX_DISPLAY_NAME + 1))
    assert "at most 200 characters, got 201" in violation.description


@pytest.mark.parametrize("labels", [{"a": "b\n"}, {"a": "\x1b"}, {"a\n": "b"}, {"a": "\u202e"}])
def test_labels_hold_no_control_characters(labels: dict[str, str]) -> None:
    (violation,) = label_violations(labels, "dataset.labels")
    assert violation.description.isprintable()
