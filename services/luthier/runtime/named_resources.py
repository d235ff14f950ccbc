"""The resources that a request names, found by one walk over the descriptors of its message.

What a request is about stands in its own `name` or `parent`; every other field that names a resource says so by its
`google.api.resource_reference`. Types below which no field does are never looked into.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

from google.api import field_behavior_pb2, resource_pb2
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from luthier.runtime.field_limits import shown_key

SUBJECTS = ("name", "parent")
"""Fields of a request of which one says what the request is about."""

Path = tuple[str, ...]
"""The fields that lead to one, from the request on, each with its place in a list or a map: `graders['a']`."""

_SUBJECT_PATHS = frozenset((name,) for name in SUBJECTS)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fields:
    """Fields of one message type, by name: those that name resources, and those of messages that may hold such."""

    naming: tuple[FieldDescriptor, ...]
    holding: tuple[FieldDescriptor, ...]


def subject_of(request: Message) -> tuple[str, str]:
    """Return the field that says what a request is about, and its value; two empty texts where none does."""
    for field in _subjects(request.DESCRIPTOR):
        value = getattr(request, field)
        if value:
            return field, value
    return "", ""


def references_of(request: Message) -> Iterable[tuple[Path, str]]:
    """Return the path and the value of every other field of a request that names a resource, however deep.

    Paths are in parts, which `".".join` makes text of: a request may name very many.
    """
    fields = _fields(request.DESCRIPTOR)
    if not fields.holding and all(field.name in SUBJECTS for field in fields.naming):
        return ()
    return (named for named in _names(request, ()) if named[0] not in _SUBJECT_PATHS)


def names_resource(field: FieldDescriptor) -> bool:
    """Tell whether a caller may name a resource in a field."""
    options = field.GetOptions()
    return options.HasExtension(resource_pb2.resource_reference) and not _is_output(field)


def _names(message: Message, prefix: Path) -> Iterator[tuple[Path, str]]:
    fields = _fields(message.DESCRIPTOR)
    for field in fields.naming:
        value = getattr(message, field.name)
        if not field.is_repeated:
            value = (value,) if value else ()
        for place, name in enumerate(value):
            yield (*prefix, f"{field.name}[{place}]" if field.is_repeated else field.name), name
    for field in fields.holding:
        for part, inner in _held(message, field):
            yield from _names(inner, (*prefix, part))


def _held(message: Message, field: FieldDescriptor) -> Iterator[tuple[str, Message]]:
    assert field.message_type is not None
    value = getattr(message, field.name)
    if field.message_type.GetOptions().map_entry:
        for key in value:
            yield f"{field.name}[{shown_key(key)}]", value[key]
    elif field.is_repeated:
        for place, inner in enumerate(value):
            yield f"{field.name}[{place}]", inner
    elif message.HasField(field.name):
        yield field.name, value


@lru_cache(maxsize=1024)
def _subjects(descriptor: Descriptor) -> tuple[str, ...]:
    known = descriptor.fields_by_name
    return tuple(
        name for name in SUBJECTS if name in known and known[name].type == FieldDescriptor.TYPE_STRING
    )


@lru_cache(maxsize=1024)
def _fields(descriptor: Descriptor) -> _Fields:
    return _Fields(
        naming=tuple(field for field in descriptor.fields if names_resource(field)),
        holding=tuple(
            field
            for field in descriptor.fields
            if not _is_output(field)
            and (inner := _message_type(field)) is not None
            and _leads_to_names(inner)
        ),
    )


def _message_type(field: FieldDescriptor) -> Descriptor | None:
    """Return the type of the messages in a field, in a map of its values; None when there are none."""
    inner = field.message_type
    if inner is not None and inner.GetOptions().map_entry:
        return inner.fields_by_name["value"].message_type
    return inner


@lru_cache(maxsize=1024)
def _leads_to_names(root: Descriptor) -> bool:
    """Tell whether a message of a type can name a resource, in itself or below; types may hold themselves."""
    seen, pending = {root.full_name}, [root]
    while pending:
        for field in pending.pop().fields:
            if names_resource(field):
                return True
            inner = None if _is_output(field) else _message_type(field)
            if inner is not None and inner.full_name not in seen:
                seen.add(inner.full_name)
                pending.append(inner)
    return False


def _is_output(field: FieldDescriptor) -> bool:
    """What the door clears: nobody who calls has said it."""
    return field_behavior_pb2.OUTPUT_ONLY in field.GetOptions().Extensions[field_behavior_pb2.field_behavior]
