"""Every field in which a caller may name a resource, or say a number, read off by another walk than the services'."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from google.api import field_behavior_pb2, resource_pb2
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

Path = tuple[FieldDescriptor, ...]

EXTREMES: Mapping[int, tuple[float, float]] = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
    FieldDescriptor.CPPTYPE_FLOAT: (-3e38, 3e38),
    FieldDescriptor.CPPTYPE_DOUBLE: (-1.7e308, 1.7e308),
}
"""The least and the most that a number of each kind can say."""
_SECONDS = {f"google.protobuf.{name}.seconds" for name in ("Timestamp", "Duration")}


@dataclass(frozen=True)
class Place:
    """One field of a method's request: the fields that lead to it, from the request on."""

    method: MethodDescriptor
    path: Path

    def __str__(self) -> str:
        return f"{self.method.full_name} {'.'.join(field.name for field in self.path)}"

    @property
    def is_subject(self) -> bool:
        """Whether it says what the request is about."""
        return len(self.path) == 1 and self.path[0].name in ("name", "parent")

    @property
    def is_required(self) -> bool:
        """Whether every request must say it."""
        options = self.path[0].GetOptions()
        is_said = field_behavior_pb2.REQUIRED in options.Extensions[field_behavior_pb2.field_behavior]
        return len(self.path) == 1 and is_said

    @property
    def shown(self) -> str:
        """The field as a violation names it, with the first value of a list and the key `a` of a map."""
        return ".".join(field.name + _index(field) for field in self.path)

    @property
    def is_the_services(self) -> bool:
        """Whether it is the service's to write and no caller's; in the worker protocol nothing is."""
        return not _is_workers(self.method) and any(map(_is_the_services, self.path))

    @property
    def value(self) -> FieldDescriptor:
        """The field of what stands there: of a map its values."""
        last: Any = self.path[-1]
        value: FieldDescriptor = last.message_type.fields_by_name["value"] if _is_map(last) else last
        return value

    def put(self, request: Message, value: str | bytes | float) -> None:
        """Write a value there."""
        message = request
        for field in self.path[:-1]:
            inner = getattr(message, field.name)
            if _is_map(field):
                message = inner["a"]
            elif field.is_repeated:
                message = inner[0] if len(inner) else inner.add()
            else:
                inner.SetInParent()
                message = inner
        last = self.path[-1]
        if _is_map(last):
            getattr(message, last.name)["a"] = value
        elif last.is_repeated:
            getattr(message, last.name).append(value)
        else:
            setattr(message, last.name, value)


def empty(method: MethodDescriptor) -> Message:
    """Return a request that says nothing."""
    return GetMessageClass(method.input_type)()


def places(method: MethodDescriptor) -> list[Place]:
    """Return the fields of a method's request that name resources; of types that hold themselves one level."""
    return [Place(method, path) for path in _paths(method)]


def texts(method: MethodDescriptor) -> Iterator[Place]:
    """Yield every text that a caller may send."""
    for path in _said(method):
        if path[-1].type == FieldDescriptor.TYPE_STRING:
            yield Place(method, path)


def numbers(method: MethodDescriptor) -> Iterator[Place]:
    """Yield every number that a caller may send, of a worker also those that elsewhere are the service's."""
    for path in _leaves(method.input_type, (), ()):
        place = Place(method, path)
        if place.value.cpp_type in EXTREMES and not place.is_the_services:
            yield place


def seconds_of_times(method: MethodDescriptor) -> Iterator[Place]:
    """Yield the seconds of every time and duration that a request can hold, also of those that are cleared."""
    for path in _leaves(method.input_type, (), ()):
        if path[-1].full_name in _SECONDS:
            yield Place(method, path)


def _paths(method: MethodDescriptor) -> Iterator[Path]:
    for path in _said(method):
        field = path[-1]
        is_subject = len(path) == 1 and field.name in ("name", "parent")
        if is_subject or field.GetOptions().HasExtension(resource_pb2.resource_reference):
            yield path


def _said(method: MethodDescriptor) -> Iterator[Path]:
    for path in _leaves(method.input_type, (), ()):
        if not any(map(_is_the_services, path)):
            yield path


def _leaves(descriptor: Descriptor, before: Path, within: tuple[str, ...]) -> Iterator[Path]:
    for field in descriptor.fields:
        inner = field.message_type
        if inner is not None and _is_map(field):
            inner = inner.fields_by_name["value"].message_type
        if inner is None:
            yield (*before, field)
        elif within.count(inner.full_name) < 2:
            yield from _leaves(inner, (*before, field), (*within, inner.full_name))


def _is_workers(method: MethodDescriptor) -> bool:
    return method.full_name.startswith("luthier.worker.")


def _is_the_services(field: FieldDescriptor) -> bool:
    behaviors = field.GetOptions().Extensions[field_behavior_pb2.field_behavior]
    return field_behavior_pb2.OUTPUT_ONLY in behaviors or field_behavior_pb2.IDENTIFIER in behaviors


def _is_map(field: FieldDescriptor) -> bool:
    return field.message_type is not None and field.message_type.GetOptions().map_entry


def _index(field: FieldDescriptor) -> str:
    if _is_map(field):
        return "['a']"
    return "[0]" if field.is_repeated else ""
