"""Limits of fields, written as a table by field path."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import Message

from luthier.errors import FieldViolation


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """Which values a field may have, and the words for it."""

    allows: Callable[[float], bool]
    rule: str


NOT_NEGATIVE = Limit(allows=lambda value: value >= 0, rule="must not be negative")


def within(least: float, most: float) -> Limit:
    """Return the limit of a number from `least` to `most`. NaN is beyond any."""
    return Limit(allows=lambda value: least <= value <= most, rule=f"must be in {least}..{most}")


def limit_violations(
    message: Message, limits: Mapping[str, Limit], prefix: str = ""
) -> Iterator[FieldViolation]:
    """Yield the fields of a message that are beyond their limits.

    The table has them by path, `max_records`, or `arms[].num_shots` for that field of every arm; `prefix` is the path
    of the message itself.
    """
    for path, limit in limits.items():
        for field, value in _values(message, path, prefix):
            if not limit.allows(value):
                yield FieldViolation(field=field, description=f"{limit.rule}, got {value}")


def _values(message: Any, path: str, prefix: str) -> Iterator[tuple[str, float]]:
    name, of_each, rest = path.partition("[].")
    if not of_each:
        yield f"{prefix}{name}", getattr(message, name)
        return
    for place, one in enumerate(getattr(message, name)):
        yield from _values(one, rest, f"{prefix}{name}[{place}].")
