"""The door: what no request may hold, whoever sends it, checked by one walk over the descriptors of its message.

The public API's rules are those of its field behaviours (AIP-203): what is OUTPUT_ONLY, and the IDENTIFIER of what
is yet to be created, are the service's to write, and what a caller put there is cleared. The worker protocol
carries what workers measured in the same messages, so there nothing is cleared; what else its messages must satisfy
is looked at where they arrive (`work.validity`). Numbers are finite everywhere: alone, in lists and in maps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from google.api import field_behavior_pb2
from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from luthier.errors import FieldViolation, InvalidArgument
from luthier.runtime.field_limits import Limit, choices, shown_key

MAX_VIOLATIONS = 20
# A walk of so many takes a quarter of a second of everybody's time; what is sent for real is far below.
MAX_MESSAGES = 50_000

_OURS = "luthier."
_WORKER_PROTOCOL = "luthier.worker."
_LEAST_SECONDS, _MOST_SECONDS = -62_135_596_800, 253_402_300_799
_MOST_SPAN_SECONDS = 315_576_000_000
_MOST_NANOS = 999_999_999


def _shown_time(value: Any) -> str:
    return f"seconds {value.seconds}, nanos {value.nanos}"


# What the well-known types promise to hold: the years 1 to 9999, and 10,000 years either way. The nanoseconds of a time
# count forward from its second, also before 1970; those of a duration have its sign.
_TIMES: Mapping[str, Limit] = {
    "google.protobuf.Timestamp": Limit(
        rule=f"must have seconds in {_LEAST_SECONDS}..{_MOST_SECONDS} and nanos in 0..{_MOST_NANOS}",
        allows=lambda one: _LEAST_SECONDS <= one.seconds <= _MOST_SECONDS and 0 <= one.nanos <= _MOST_NANOS,
        shown=_shown_time,
    ),
    "google.protobuf.Duration": Limit(
        rule=(
            f"must have seconds in {-_MOST_SPAN_SECONDS}..{_MOST_SPAN_SECONDS} and nanos of the same sign in "
            f"{-_MOST_NANOS}..{_MOST_NANOS}"
        ),
        allows=lambda one: (
            abs(one.seconds) <= _MOST_SPAN_SECONDS
            and abs(one.nanos) <= _MOST_NANOS
            and one.seconds * one.nanos >= 0
        ),
        shown=_shown_time,
    ),
}

Check = Callable[[Any, str, list[FieldViolation]], None]
"""Looks at the value of one field, and writes down what is wrong with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rules:
    """Of whom a message comes."""

    clears_output: bool
    clears_identifier: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Treatment:
    """What to do with the fields of one message type, by number; a field that stands in neither is let pass."""

    cleared: frozenset[int]
    checks: Mapping[int, Check]


def admit(request: Message) -> None:
    """Clear what is not the caller's to say, in place; refuse what no handler could mean.

    Messages of other packages (health, reflection) are let pass as they are.

    Raises InvalidArgument that names each field, the first `MAX_VIOLATIONS` of them: fields and enum numbers that
    this service does not know (a newer caller's wish must not become this service's default), numbers that are
    not finite, times that no calendar has, lists without measure.
    """
    descriptor = request.DESCRIPTOR
    if not descriptor.full_name.startswith(_OURS):
        return
    is_public = not descriptor.full_name.startswith(_WORKER_PROTOCOL)
    rules = _Rules(
        clears_output=is_public, clears_identifier=is_public and descriptor.name.startswith("Create")
    )
    violations: list[FieldViolation] = []
    _walk(request, rules, "", violations)
    if violations:
        raise InvalidArgument.of_fields(*violations[:MAX_VIOLATIONS])


def _walk(message: Message, rules: _Rules, prefix: str, violations: list[FieldViolation]) -> None:
    treatment = _treatment(message.DESCRIPTOR, rules)
    for field, value in message.ListFields():
        if field.number in treatment.cleared:
            message.ClearField(field.name)
        elif (check := treatment.checks.get(field.number)) is not None and len(violations) < MAX_VIOLATIONS:
            check(value, prefix + field.name, violations)
    unknown: Any = UnknownFieldSet(message)
    if len(unknown):
        numbers = sorted({one.field_number for one in unknown})
        shown = ", ".join(map(str, numbers[:5])) + (", ..." if len(numbers) > 5 else "")
        description = f"must hold fields of {message.DESCRIPTOR.full_name} only, got unknown field {shown}"
        where = prefix.rstrip(".") or message.DESCRIPTOR.name
        violations.append(FieldViolation(field=where, description=description))


@lru_cache(maxsize=1024)
def _treatment(descriptor: Descriptor, rules: _Rules) -> _Treatment:
    cleared = {field.number for field in descriptor.fields if _is_cleared(field, rules)}
    checks = {
        field.number: check
        for field in descriptor.fields
        if field.number not in cleared and (check := _check(field, rules)) is not None
    }
    return _Treatment(cleared=frozenset(cleared), checks=checks)


def _is_cleared(field: FieldDescriptor, rules: _Rules) -> bool:
    behaviors = field.GetOptions().Extensions[field_behavior_pb2.field_behavior]
    return (rules.clears_output and field_behavior_pb2.OUTPUT_ONLY in behaviors) or (
        rules.clears_identifier and field_behavior_pb2.IDENTIFIER in behaviors
    )


def _check(field: FieldDescriptor, rules: _Rules) -> Check | None:
    inner = field.message_type
    if inner is not None and inner.GetOptions().map_entry:
        value_field = inner.fields_by_name["value"]
        of_one = _check_one(value_field, rules)
        return None if of_one is None else _each_of_map(of_one)
    of_one = _check_one(field, rules)
    return _each(of_one) if of_one is not None and field.is_repeated else of_one


def _check_one(field: FieldDescriptor, rules: _Rules) -> Check | None:
    if field.enum_type is not None:
        return _known(field.enum_type)
    if _is_float(field):
        return _finite
    if field.message_type is None:
        return None
    limit = _TIMES.get(field.message_type.full_name)
    return _message(rules) if limit is None else _within(limit)


def _is_float(field: FieldDescriptor) -> bool:
    return field.cpp_type in (FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT)


def _known(enum: EnumDescriptor) -> Check:
    numbers = frozenset(enum.values_by_number)
    right = choices(enum)

    def check(value: int, path: str, violations: list[FieldViolation]) -> None:
        if value not in numbers:
            description = f"must be one of {right}, got number {value}"
            violations.append(FieldViolation(field=path, description=description))

    return check


def _finite(value: float, path: str, violations: list[FieldViolation]) -> None:
    if not math.isfinite(value):
        violations.append(FieldViolation(field=path, description=f"must be a finite number, got {value}"))


def _within(limit: Limit) -> Check:
    def check(value: Any, path: str, violations: list[FieldViolation]) -> None:
        if not limit.allows(value):
            description = f"{limit.rule}, got {limit.shown(value)}"
            violations.append(FieldViolation(field=path, description=description))

    return check


def _message(rules: _Rules) -> Check:
    def check(value: Message, path: str, violations: list[FieldViolation]) -> None:
        _walk(value, rules, f"{path}.", violations)

    return check


def _each(check: Check) -> Check:
    def check_each(values: Sequence[Any], path: str, violations: list[FieldViolation]) -> None:
        if _are_too_many(values, path, violations):
            return
        for place, value in enumerate(values):
            if len(violations) >= MAX_VIOLATIONS:
                return
            check(value, f"{path}[{place}]", violations)

    return check_each


def _each_of_map(check: Check) -> Check:
    def check_each(values: Mapping[Any, Any], path: str, violations: list[FieldViolation]) -> None:
        if _are_too_many(values, path, violations):
            return
        for key in values:
            if len(violations) >= MAX_VIOLATIONS:
                return
            check(values[key], f"{path}[{shown_key(key)}]", violations)

    return check_each


def _are_too_many(values: Sized, path: str, violations: list[FieldViolation]) -> bool:
    if len(values) <= MAX_MESSAGES:
        return False
    description = f"must hold at most {MAX_MESSAGES} values, got {len(values)}"
    violations.append(FieldViolation(field=path, description=description))
    return True
