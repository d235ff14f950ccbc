"""Every field in which a caller may name a resource, read off the descriptors by another walk than the services'."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from google.api import field_behavior_pb2, resource_pb2
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

Path = tuple[FieldDescriptor, ...]


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

    def put(self, request: Message, name: str) -> None:
        """Write a name there."""
        message = request
        for field in self.path[:-1]:
            value = getattr(message, field.name)
            if _is_map(field):
                message = value["a"]
            elif field.is_repeated:
                message = value[0] if len(value) else value.add()
            else:
                value.SetInParent()
                message = value
        last = self.path[-1]
        if last.is_repeated:
            getattr(message, last.name).append(name)
        else:
            setattr(message, last.name, name)


def empty(method: MethodDescriptor) -> Message:
    """Return a request that says nothing."""
    return GetMessageClass(method.input_type)()


def places(method: MethodDescriptor) -> list[Place]:
    """Return the fields of a method's request that name resources; of types that hold themselves one level."""
    return [Place(method, path) for path in _paths(method.input_type, (), ())]


def texts(method: MethodDescriptor) -> Iterator[Place]:
    """Yield every text that a caller may send."""
    for path in _leaves(method.input_type, (), ()):
        if path[-1].type == FieldDescriptor.TYPE_STRING:
            yield Place(method, path)


def _paths(descriptor: Descriptor, before: Path, within: tuple[str, ...]) -> Iterator[Path]:
    for path in _leaves(descriptor, before, within):
        field = path[-1]
        is_subject = len(path) == 1 and field.name in ("name", "parent")
        if is_subject or field.GetOptions().HasExtension(resource_pb2.resource_reference):
            yield path


def _leaves(descriptor: Descriptor, before: Path, within: tuple[str, ...]) -> Iterator[Path]:
    for field in descriptor.fields:
        behaviors = field.GetOptions().Extensions[field_behavior_pb2.field_behavior]
        if field_behavior_pb2.OUTPUT_ONLY in behaviors or field_behavior_pb2.IDENTIFIER in behaviors:
            continue
        inner = field.message_type
        if inner is not None and _is_map(field):
            inner = inner.fields_by_name["value"].message_type
        if inner is None:
            yield (*before, field)
        elif within.count(inner.full_name) < 2:
            yield from _leaves(inner, (*before, field), (*within, inner.full_name))


def _is_map(field: FieldDescriptor) -> bool:
    return field.message_type is not None and field.message_type.GetOptions().map_entry


def _index(field: FieldDescriptor) -> str:
    if _is_map(field):
        return "['a']"
    return "[0]" if field.is_repeated else ""
