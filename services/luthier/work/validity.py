"""What every message of the worker protocol must satisfy before anything looks at it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.rpc import code_pb2

from luthier.errors import FieldViolation, InvalidArgument, Reason
from luthier.storage.files import relative_path_problem

MAX_ID_CHARACTERS = 128
_IDS = frozenset({"instance", "lock", "claim", "task", "generation"})
_WHOLES = frozenset({FieldDescriptor.TYPE_INT32, FieldDescriptor.TYPE_INT64})
_FLOATS = frozenset({FieldDescriptor.TYPE_DOUBLE, FieldDescriptor.TYPE_FLOAT})
_SHARES = frozenset({"device_use"})
_CODES = frozenset(code_pb2.Code.values()) - {code_pb2.OK}


def require_valid(message: Message) -> None:
    """Return if every part of a request, however deep, is one that a worker may send.

    Whole numbers and times must not be negative, shares in 0..1, ids short, paths of files relative and below their
    folder and each named once, and the code of an error one of gRPC's other than OK. What holds for every request, that
    numbers are finite among it, is the door's to check (`runtime.door`).

    Raises:
        InvalidArgument: names each field that is not, its value, and what would be right.
    """
    violations = list(_violations(message, ""))
    if violations:
        raise InvalidArgument.of_fields(*violations)


def _violations(message: Any, where: str) -> Iterator[FieldViolation]:
    for field, value in message.ListFields():
        path = f"{where}{field.name}"
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            yield from _map_violations(field, value, path)
        elif field.is_repeated:
            yield from _twice(value, path)
            for index, item in enumerate(value):
                yield from _value_violations(field, item, f"{path}[{index}]")
        else:
            yield from _value_violations(field, value, path)
    if message.DESCRIPTOR.full_name == "google.rpc.Status" and message.code not in _CODES:
        yield _wrong(f"{where}code", f"must be a gRPC status code from 1 to 16, got {message.code}")
    if _is_file(message):
        problem = relative_path_problem(message.path)
        if problem:
            yield _wrong(f"{where}path", problem, Reason.PATH_NOT_ALLOWED)


def _is_file(value: object) -> bool:
    return isinstance(value, Message) and {"path", "sha256"} <= set(value.DESCRIPTOR.fields_by_name)


def _twice(parts: Any, where: str) -> Iterator[FieldViolation]:
    seen: set[str] = set()
    for part in parts:
        if not _is_file(part):
            return
        if part.path in seen:
            yield _wrong(where, f"must name each file once, got {part.path!r} twice", Reason.PATH_NOT_ALLOWED)
        seen.add(part.path)


def _map_violations(field: FieldDescriptor, entries: Any, path: str) -> Iterator[FieldViolation]:
    assert field.message_type is not None, "a map is a field of messages"
    inner = field.message_type.fields_by_name["value"]
    for key, value in entries.items():
        yield from _value_violations(inner, value, f"{path}[{key!r}]")
        if _is_time(inner, field.name) and value < 0:
            yield _negative(f"{path}[{key!r}]", value)


def _value_violations(field: FieldDescriptor, value: Any, path: str) -> Iterator[FieldViolation]:
    if field.message_type is not None:
        if field.message_type.file.package != "google.protobuf":  # their contents are nobody's numbers here
            yield from _violations(value, f"{path}.")
    elif field.name in _SHARES:
        if not 0 <= value <= 1:
            yield _wrong(path, f"must be in 0..1, got {value}")
    elif field.type in _WHOLES or _is_time(field, field.name):
        if value < 0:
            yield _negative(path, value)
    elif field.name in _IDS and len(value) > MAX_ID_CHARACTERS:
        yield _wrong(path, f"must have at most {MAX_ID_CHARACTERS} characters, got {len(value)}")


def _is_time(field: FieldDescriptor, name: str) -> bool:
    """Tell whether a field of this name, or a value of the map that has it, is a length of time."""
    return field.type in _FLOATS and name.endswith("seconds")


def _negative(field: str, value: float) -> FieldViolation:
    return _wrong(field, f"must not be negative, got {value}")


def _wrong(field: str, description: str, reason: Reason = Reason.INVALID_FIELD) -> FieldViolation:
    return FieldViolation(field=field, description=description, reason=reason)
