"""What users may call things: labels and display names."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping

from luthier.errors import FieldViolation
from luthier.runtime.field_limits import Limit, Limits, characters

MAX_LABELS = 64
MAX_DISPLAY_NAME = 200
# Overrides and isolates of bidirectional writing: with them a name reads as another one.
_TURNING = frozenset(map(chr, (*range(0x202A, 0x202F), *range(0x2066, 0x206A))))
_KEY = re.compile(r"[a-z][a-z0-9_-]{0,62}")
_VALUE = re.compile(r"[A-Za-z0-9_.-]{0,63}")


def _steering(text: str) -> int | None:
    """Return the place of the first character that steers a terminal or turns writing around."""
    places = enumerate(text)
    return next((at for at, one in places if unicodedata.category(one) == "Cc" or one in _TURNING), None)


def _steered_at(text: str) -> str:
    place = _steering(text)
    return "none" if place is None else f"U+{ord(text[place]):04X} at {place}"


DISPLAY_NAME: Limits = (
    characters(MAX_DISPLAY_NAME),
    Limit(
        rule="must hold no control characters and no marks that turn writing around",
        allows=lambda text: _steering(text) is None,
        shown=_steered_at,
    ),
)
"""Of a name for people."""


def label_violations(labels: Mapping[str, str], field: str) -> Iterator[FieldViolation]:
    """Yield what is wrong with labels; `field` is their path in the request."""
    if len(labels) > MAX_LABELS:
        yield FieldViolation(
            field=field, description=f"must hold at most {MAX_LABELS} labels, got {len(labels)}"
        )
    for key, value in labels.items():
        if not _KEY.fullmatch(key):
            yield FieldViolation(field=field, description=f"a key must match {_KEY.pattern}, got {key!r}")
        if not _VALUE.fullmatch(value):
            description = f"the value of {key!r} must match {_VALUE.pattern}, got {value!r}"
            yield FieldViolation(field=field, description=description)
