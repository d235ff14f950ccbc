"""Limits and defaults of a message's fields as tables by path: `"hyperparameters.num_epochs": whole(1, 10_000)`.

A path leads through messages (`lora.rank`) and through every value of a list (`arms[].num_shots`, `metrics[]`); one
that ends at a list is of the list itself (`arms`). A message that is not there is not looked into.

A field counts as said when it is present; one that knows no presence, when it is not zero; a value of a list always is.
What is not said is within every limit that does not require it, and takes its default.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from typing import Any

from google.protobuf.descriptor import Descriptor, EnumDescriptor
from google.protobuf.message import Message

from luthier.errors import FieldViolation, InvalidArgument, Reason

MAX_VIOLATIONS = 100
"""More than an answer has room for."""
_SHOWN_CHARACTERS = 100
_SHOWN_CHOICES = 12


def _shown(value: Any) -> str:
    if isinstance(value, str) and value:
        return repr(value if len(value) <= _SHOWN_CHARACTERS else f"{value[:_SHOWN_CHARACTERS]}…")
    return repr(value) if isinstance(value, int | float) else "nothing"


def _shown_length(value: Any) -> str:
    return str(len(value))


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """What a value must be.

    Attributes:
        rule: in words, `must be in 1..8`.
        allows: as a test.
        shown: what a refusal says of the value.
        is_required: whether it must be said at all.
        reason: of a value that is said and breaks it.
    """

    rule: str
    allows: Callable[[Any], bool]
    shown: Callable[[Any], str] = _shown
    is_required: bool = False
    reason: Reason = Reason.INVALID_FIELD


Limits = Limit | tuple[Limit, ...]
"""Of one field; of several the first that is broken is named."""
LimitTable = Mapping[str, Limits]
"""Limits by path."""

_Holders = dict[str, Sequence[tuple[str, Any]]]

ANY: Limits = ()
"""Whatever the field can hold, and all that is in it."""


# Limits of numbers are written so that NaN is refused.
def whole(least: int, most: int) -> Limit:
    """Return the limit of a whole number."""
    return Limit(rule=f"must be in {least}..{most}", allows=lambda value: least <= value <= most)


def positive(most: float) -> Limit:
    """Return the limit of a number above 0."""
    return Limit(rule=f"must be above 0 and at most {most:g}", allows=lambda value: 0 < value <= most)


def not_negative(most: float) -> Limit:
    """Return the limit of a number that may be 0."""
    return Limit(rule=f"must be in 0..{most:g}", allows=lambda value: 0 <= value <= most)


def count(most: int, things: str, *, least: int = 0) -> Limit:
    """Return the limit of how many values a list or a map holds; `things` is what they are called."""
    rule = f"must hold {least} to {most} {things}" if least else f"must hold at most {most} {things}"
    return Limit(
        rule=rule,
        allows=lambda values: least <= len(values) <= most,
        shown=_shown_length,
        is_required=least > 0,
    )


def characters(most: int) -> Limit:
    """Return the limit of a text's length in characters."""
    return Limit(
        rule=f"must be at most {most} characters", allows=lambda text: len(text) <= most, shown=_shown_length
    )


def num_bytes(most: int) -> Limit:
    """Return the limit of how many bytes a value has, a text in UTF-8."""
    return Limit(
        rule=f"must be at most {most} bytes",
        allows=lambda value: _num_bytes(value) <= most,
        shown=lambda value: str(_num_bytes(value)),
    )


def _num_bytes(value: str | bytes) -> int:
    return len(value.encode() if isinstance(value, str) else value)


def matching(pattern: re.Pattern[str], words: str) -> Limit:
    """Return the limit of a text that matches a pattern from end to end; `words` say what it must be."""
    return Limit(rule=f"must be {words}", allows=lambda text: pattern.fullmatch(text) is not None)


def named(enum: EnumDescriptor) -> Limit:
    """Return the limit of an enum whose zero means nothing: one of the others must be said."""
    return Limit(
        rule=f"must be one of {choices(enum)}",
        allows=lambda number: number != 0,
        shown=lambda number: f"number {number}",
        is_required=True,
    )


def required(rule: str) -> Limit:
    """Return the limit of a field that must be said, whatever it says; `rule` is in words: `must name a model`."""
    return Limit(rule=rule, allows=lambda _: True, is_required=True)


def demanded(limit: Limit) -> Limit:
    """Return a limit that requires its field to be said."""
    return replace(limit, is_required=True)


REQUIRED = required("must be set")
SHARE = Limit(rule="must be in [0, 1)", allows=lambda value: 0 <= value < 1)
DIGEST = matching(re.compile(r"[0-9a-f]{64}"), "64 lowercase hex digits")


def choices(enum: EnumDescriptor) -> str:
    """Return what an enum's values are called, less the first, which is nobody's choice."""
    prefix = enum.values[0].name.removesuffix("UNSPECIFIED")
    names = [one.name.removeprefix(prefix) for one in enum.values[1:]]
    return ", ".join(names[:_SHOWN_CHOICES]) + (", ..." if len(names) > _SHOWN_CHOICES else "")


def shown_key(key: object) -> str:
    """Return a map's key as a path shows it: every path below it is as long again, and a caller chose it."""
    return _shown(key) if key else repr(key)


def under(path: str, limits: LimitTable) -> LimitTable:
    """Return a table of a message as a table of the message in which it stands at a path."""
    return {f"{path}.{inner}": limit for inner, limit in limits.items()}


def limit_violations(
    message: Message, limits: LimitTable, field: str = "", *, is_part: bool = False
) -> Iterator[FieldViolation]:
    """Yield what is beyond its limit, in the order of the table.

    Args:
        message: what is looked at.
        limits: its table.
        field: its own path in the request; empty: it is the request.
        is_part: whether it is a part of what it could have been: its own fields need not be said.
    """
    holders: _Holders = {"": [(f"{field}." if field else "", message)]}
    for path, limit in limits.items():
        chain = limit if isinstance(limit, tuple) else (limit,)
        if is_part and "." not in path:
            chain = tuple(replace(one, is_required=False) for one in chain)
        for place, value, is_said in _values(path, holders) if chain else ():
            broken = next((one for one in chain if _is_broken(one, value, is_said)), None)
            if broken is not None:
                yield FieldViolation(
                    field=place,
                    description=f"{broken.rule}, got {broken.shown(value)}",
                    reason=broken.reason if is_said else Reason.FIELD_REQUIRED,
                )


def refuse(violations: Iterable[FieldViolation]) -> None:
    """Raise InvalidArgument that names each wrong field, the first `MAX_VIOLATIONS` of them; return when none is."""
    found = list(islice(violations, MAX_VIOLATIONS))
    if found:
        raise InvalidArgument.of_fields(*found)


def fill_defaults(message: Message, defaults: Mapping[str, Any]) -> None:
    """Set, in place, what is not said. No path leads through a list."""
    for path, default in defaults.items():
        *parents, name = path.split(".")
        holder = message
        for parent in parents:
            holder = getattr(holder, parent)
        if not _is_said(holder, name):
            setattr(holder, name, default)


def _is_broken(limit: Limit, value: Any, is_said: bool) -> bool:
    return not limit.allows(value) if is_said else limit.is_required


def _values(path: str, holders: _Holders) -> Iterator[tuple[str, Any, bool]]:
    """Yield what stands at a path: the place of each, its value, and whether it is said."""
    parent, _, step = path.rpartition(".")
    name = step.removesuffix("[]")
    for place, holder in _at(parent, holders):
        if step == name:
            yield place + name, getattr(holder, name), _is_said(holder, name)
        else:
            yield from (
                (f"{place}{name}[{index}]", one, True) for index, one in enumerate(getattr(holder, name))
            )


def _at(path: str, holders: _Holders) -> Sequence[tuple[str, Any]]:
    """Return the messages at a path, each with its place and a dot behind it; keep them for the next path."""
    if path not in holders:
        parent, _, step = path.rpartition(".")
        name = step.removesuffix("[]")
        found: list[tuple[str, Any]] = []
        for place, holder in _at(parent, holders):
            if step != name:
                found += (
                    (f"{place}{name}[{index}].", one) for index, one in enumerate(getattr(holder, name))
                )
            elif holder.HasField(name):
                found.append((f"{place}{name}.", getattr(holder, name)))
        holders[path] = found
    return holders[path]


def _is_said(message: Message, name: str) -> bool:
    if _knows_presence(message.DESCRIPTOR, name):
        return message.HasField(name)
    return bool(getattr(message, name))


@lru_cache(maxsize=1024)
def _knows_presence(descriptor: Descriptor, name: str) -> bool:
    return bool(descriptor.fields_by_name[name].has_presence)
