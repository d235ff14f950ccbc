"""A message with a field of every kind, and messages of any kind at random, for tests that go by descriptors."""

from __future__ import annotations

import math
from typing import Any

from google.protobuf import (
    descriptor_pb2,
    descriptor_pool,
    duration_pb2,
    json_format,
    message_factory,
    struct_pb2,
    timestamp_pb2,
    wrappers_pb2,
)
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from hypothesis import strategies as st

from luthier.client.field_values import is_identifier, is_map, is_output_only


def _every_kind() -> type[Message]:
    """A message that has a field of every kind, alone, in a list and in maps; and itself."""
    file = descriptor_pb2.FileDescriptorProto(
        name="luthier_tests/every_kind.proto", package="luthier_tests", syntax="proto3"
    )
    wrapped = (
        ("timestamp", "Timestamp"),
        ("duration", "Duration"),
        ("struct", "Struct"),
        ("wrappers", "Int64Value"),
    )
    file.dependency.extend(f"google/protobuf/{name}.proto" for name, _ in wrapped)
    color = file.enum_type.add(name="Color")
    for number, name in enumerate(("COLOR_UNSPECIFIED", "COLOR_RED", "COLOR_DEEP_BLUE")):
        color.value.add(name=name, number=number)
    message = file.message_type.add(name="EveryKind")
    message.oneof_decl.add(name="choice")
    typed = descriptor_pb2.FieldDescriptorProto
    scalars: dict[str, dict[str, Any]] = {
        name.removeprefix("TYPE_").lower(): {"type": number}
        for name, number in typed.Type.items()
        if name not in ("TYPE_GROUP", "TYPE_MESSAGE", "TYPE_ENUM")
    }
    others: dict[str, dict[str, Any]] = {
        name.lower(): {"type": 11, "type_name": f".google.protobuf.{name}"} for _, name in wrapped
    }
    others["color"] = {"type": 14, "type_name": ".luthier_tests.Color"}
    others["inner"] = {"type": 11, "type_name": ".luthier_tests.EveryKind"}

    def add(name: str, **parts: Any) -> None:
        message.field.add(name=name, number=len(message.field) + 1, **{"label": 1, **parts})

    def add_map(name: str, key: int, value: dict[str, Any]) -> None:
        entry = message.nested_type.add(name=f"{name.title().replace('_', '')}Entry")
        entry.options.map_entry = True
        entry.field.add(name="key", number=1, label=1, type=key)
        entry.field.add(name="value", number=2, label=1, **value)
        add(name, label=3, type=11, type_name=f".luthier_tests.EveryKind.{entry.name}")

    for name, parts in {**scalars, **others}.items():
        add(f"one_{name}", **parts)
        add(f"many_{name}", label=3, **parts)
        add_map(f"by_text_{name}", typed.TYPE_STRING, parts)
    for name in ("int32", "uint64", "bool"):
        add_map(f"by_{name}_text", scalars[name]["type"], scalars["string"])
    for name in ("int64", "string"):
        add(f"either_{name}", oneof_index=0, **scalars[name])
    pool = descriptor_pool.Default()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("luthier_tests.EveryKind"))


EveryKind = _every_kind()


def fields_of(kind: Message | type[Message]) -> list[Any]:
    """The fields of a message; which class their descriptors are of is protobuf's own affair."""
    return list(kind.DESCRIPTOR.fields)


def _scalars(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    kind = FieldDescriptor
    if field.enum_type is not None:
        return st.sampled_from(sorted(field.enum_type.values_by_number))
    if field.type == kind.TYPE_BYTES:
        return st.binary(max_size=20)
    bits = {kind.CPPTYPE_INT32: 31, kind.CPPTYPE_INT64: 63, kind.CPPTYPE_UINT32: 32, kind.CPPTYPE_UINT64: 64}
    if field.cpp_type in bits:
        most = 2 ** bits[field.cpp_type]
        is_signed = field.cpp_type in (kind.CPPTYPE_INT32, kind.CPPTYPE_INT64)
        return st.integers(-most if is_signed else 0, most - 1)
    return {
        kind.CPPTYPE_STRING: st.text(st.characters(exclude_categories=["Cs"]), max_size=100),
        kind.CPPTYPE_BOOL: st.booleans(),
        kind.CPPTYPE_DOUBLE: st.floats(allow_nan=False) | st.just(math.nan),
        kind.CPPTYPE_FLOAT: st.floats(allow_nan=False, width=32) | st.just(math.nan),
    }[field.cpp_type]


_JSON = st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | st.text("aé~:#-{ 1.")
_WELL_KNOWN: dict[str, st.SearchStrategy[Message]] = {
    "Timestamp": st.builds(
        timestamp_pb2.Timestamp, seconds=st.integers(0, 2**32), nanos=st.sampled_from([0, 1, 500_000_000])
    ),
    "Duration": st.builds(
        duration_pb2.Duration, seconds=st.integers(0, 2**32), nanos=st.sampled_from([0, 1, 250_000_000])
    ),
    "Int64Value": st.builds(wrappers_pb2.Int64Value, value=st.integers(-(2**63), 2**63 - 1)),
    "Struct": st.dictionaries(st.text("ab.-é"), _JSON | st.lists(_JSON, max_size=3), max_size=3).map(
        lambda value: json_format.ParseDict(value, struct_pb2.Struct())
    ),
}


@st.composite
def messages(draw: st.DrawFn, descriptor: Any, depth: int = 0) -> Message:
    """A message whose fields, but those that are the service's to write, hold anything."""
    if descriptor.full_name.startswith("google.protobuf."):
        return draw(_WELL_KNOWN[descriptor.name])
    message = message_factory.GetMessageClass(descriptor)()
    fields = [one for one in descriptor.fields if not is_output_only(one) and not is_identifier(one)]
    some = (
        st.lists(st.sampled_from(fields), max_size=6, unique_by=lambda one: one.name)
        if fields
        else st.just([])
    )
    for field in draw(some):
        if field.message_type is not None and not is_map(field) and depth == 2:
            continue
        _draw_field(draw, message, field, depth)
    return message


def _draw_field(draw: st.DrawFn, message: Message, field: Any, depth: int) -> None:
    def one(of: FieldDescriptor) -> Any:
        return draw(_scalars(of) if of.message_type is None else messages(of.message_type, depth + 1))

    target = getattr(message, field.name)
    if is_map(field):
        entry = field.message_type.fields_by_name
        for key in draw(st.lists(_scalars(entry["key"]), max_size=2)):
            if entry["value"].message_type is None:
                target[key] = one(entry["value"])
            elif depth < 2:
                target[key].CopyFrom(one(entry["value"]))
    elif field.is_repeated:
        target.extend(one(field) for _ in range(draw(st.integers(0, 2))))
    elif field.message_type is not None:
        target.CopyFrom(one(field))
    else:
        setattr(message, field.name, one(field))
