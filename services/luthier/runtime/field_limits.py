"""Limits and defaults of a message's fields as tables by path: `"hyperparameters.num_epochs": whole(1, 10_000)`.

A field counts as said when it is present; one that knows no presence, when it is not zero. What is not said is within
every limit, and takes its default.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import Message

from luthier.errors import FieldViolation


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """What a value must be: in words, and as a test."""

    rule: str
    allows: Callable[[Any], bool]


# Each is written so that NaN is refused.
def whole(least: int, most: int) -> Limit:
    """Return the limit of a whole number."""
    return Limit(rule=f"in {least}..{most}", allows=lambda value: least <= value <= most)


def positive(most: float) -> Limit:
    """Return the limit of a number above 0."""
    return Limit(rule=f"above 0 and at most {most:g}", allows=lambda value: 0 < value <= most)


def not_negative(most: float) -> Limit:
    """Return the limit of a number that may be 0."""
    return Limit(rule=f"in 0..{most:g}", allows=lambda value: 0 <= value <= most)


def limit_violations(message: Message, limits: Mapping[str, Limit], field: str) -> Iterator[FieldViolation]:
    """Yield what is beyond its limit, in the order of the table; `field` is the message's own path in the request."""
    for path, limit in limits.items():
        holder, name = _holder(message, path)
        if _is_said(holder, name) and not limit.allows(value := getattr(holder, name)):
            description = f"{path} must be {limit.rule}, got {value!r}"
            yield FieldViolation(field=f"{field}.{path}", description=description)


def fill_defaults(message: Message, defaults: Mapping[str, Any]) -> None:
    """Set, in place, what is not said."""
    for path, default in defaults.items():
        holder, name = _holder(message, path)
        if not _is_said(holder, name):
            setattr(holder, name, default)


def _holder(message: Message, path: str) -> tuple[Message, str]:
    """Return the message in which the field at a path stands, and the field's name."""
    *parents, name = path.split(".")
    for parent in parents:
        message = getattr(message, parent)
    return message, name


def _is_said(message: Message, name: str) -> bool:
    if message.DESCRIPTOR.fields_by_name[name].has_presence:
        return message.HasField(name)
    return bool(getattr(message, name))
