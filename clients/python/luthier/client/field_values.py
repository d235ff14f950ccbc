"""What a word that somebody wrote means for a field: its type decides, not the word's spelling."""

from __future__ import annotations

import base64
import difflib
import re
from decimal import Decimal
from typing import Any, TypeAlias

from google.api import field_behavior_pb2
from google.protobuf.descriptor import EnumDescriptor, FieldDescriptor

from luthier.client.documents import Mapping, Node, Scalar, Sequence

Value: TypeAlias = bool | int | float | str | bytes

_NUMBER = re.compile(
    r"[-+]?(?:(?:0|[1-9][0-9]{0,400})(?:\.[0-9]{0,400})?|\.[0-9]{1,400})(?:[eE][-+]?[0-9]{1,3})?"
)
_WORDS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
# Of proto JSON; services refuse them by name.
_NOT_FINITE = ("NaN", "Infinity", "-Infinity")
_INTEGERS = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}
_LARGEST = {
    FieldDescriptor.CPPTYPE_DOUBLE: 1.7976931348623157e308,
    FieldDescriptor.CPPTYPE_FLOAT: 3.4028235677973366e38,
}


def read_value(field: FieldDescriptor, node: Node) -> Value | None:
    """Return the value for a scalar field, of one element where it is repeated; None when `node` does not say one."""
    if not isinstance(node, Scalar):
        return None
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        return _read_text(field, node)
    if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        return _WORDS.get(node.text) if node.style != "quoted" else None
    if field.enum_type is not None:
        return _read_enum(field.enum_type, node)
    if _NUMBER.fullmatch(node.text) is None:
        is_float = field.cpp_type in _LARGEST
        return float(node.text) if is_float and node.text in _NOT_FINITE else None
    if field.cpp_type in _LARGEST:
        number = float(node.text)
        return number if abs(number) <= _LARGEST[field.cpp_type] else None
    least, most = _INTEGERS[field.cpp_type]
    exact = Decimal(node.text)
    return int(exact) if least <= exact <= most and exact == exact.to_integral_value() else None


def described(field: FieldDescriptor, node: Node | None = None) -> str:
    """Return what a field takes, for an error message; with what `node` may have meant."""
    if is_map(field):
        return "a mapping"
    if field.is_repeated and node is None:
        return "a list"
    if field.message_type is not None:
        return f"a {field.message_type.name}"
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        kind = "base64" if field.type == FieldDescriptor.TYPE_BYTES else "a string"
        return f"{kind} in quotes" if isinstance(node, Scalar) and node.style == "json" else kind
    if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        return "true or false"
    if field.enum_type is not None:
        return _described_enum(field.enum_type, node)
    if field.cpp_type in _LARGEST:
        is_too_large = isinstance(node, Scalar) and _NUMBER.fullmatch(node.text) is not None
        return f"a number of at most {_LARGEST[field.cpp_type]:.2g}" if is_too_large else "a number"
    least, most = _INTEGERS[field.cpp_type]
    return f"a whole number from {least} to {most}"


def plain_value(node: Node) -> Any:
    """Return a node as JSON would have it, for messages that have a JSON of their own (Timestamp, Struct)."""
    if isinstance(node, Mapping):
        return {key.text: plain_value(value) for key, value in node.pairs}
    if isinstance(node, Sequence):
        return [plain_value(item) for item in node.items]
    if node.is_null:
        return None
    if node.style == "quoted":
        return node.text
    if node.text in _WORDS:
        return _WORDS[node.text]
    return float(node.text) if _NUMBER.fullmatch(node.text) else node.text


def is_map(field: FieldDescriptor) -> bool:
    """Say whether a field is a map."""
    return field.message_type is not None and field.message_type.GetOptions().map_entry


def is_output_only(field: FieldDescriptor) -> bool:
    """Say whether the service alone writes a field."""
    return _behaves(field, field_behavior_pb2.OUTPUT_ONLY)


def is_identifier(field: FieldDescriptor) -> bool:
    """Say whether a field is the resource's name, which is given apart where one is created."""
    return _behaves(field, field_behavior_pb2.IDENTIFIER)


def is_required(field: FieldDescriptor) -> bool:
    """Say whether a field must be set."""
    return _behaves(field, field_behavior_pb2.REQUIRED)


def _behaves(field: FieldDescriptor, behavior: int) -> bool:
    return behavior in field.GetOptions().Extensions[field_behavior_pb2.field_behavior]


def _read_text(field: FieldDescriptor, node: Scalar) -> str | bytes | None:
    if node.style == "json" or node.is_null:
        return None
    try:
        encoded = node.text.encode()
        return (
            base64.b64decode(encoded, validate=True)
            if field.type == FieldDescriptor.TYPE_BYTES
            else node.text
        )
    except ValueError:
        # Half of a surrogate pair, or no base64.
        return None


def _read_enum(enum: EnumDescriptor, node: Scalar) -> int | None:
    name = node.text.upper().replace("-", "_")
    for value in enum.values:
        if name in (value.name, value.name.removeprefix(_prefix(enum))):
            return value.number
    if node.style == "quoted" or not node.text.isdecimal():
        return None
    return next((value.number for value in enum.values if str(value.number) == node.text), None)


def _described_enum(enum: EnumDescriptor, node: Node | None) -> str:
    names = [value.name.removeprefix(_prefix(enum)) for value in enum.values[1:]]
    listed = f"one of {', '.join(names)}"
    written = node.text.upper().replace("-", "_") if isinstance(node, Scalar) else ""
    near = difflib.get_close_matches(written.removeprefix(_prefix(enum)), names, n=1)
    return f"{listed} (did you mean {near[0]}?)" if near else listed


def _prefix(enum: EnumDescriptor) -> str:
    return enum.values[0].name.removesuffix("UNSPECIFIED")
