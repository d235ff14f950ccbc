"""The resources that a request names, found by one walk over the descriptors of its message.

What a request is about stands in its own `name` or `parent`, or in the `name` of what it updates (AIP-134); every other
field that names a resource says so by its `google.api.resource_reference`. Types below which no field does are never
looked into.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from google.api import field_behavior_pb2, resource_pb2
from google.protobuf.descriptor import Descriptor, FieldDescriptor, FileDescriptor
from google.protobuf.message import Message

from luthier.runtime.field_limits import shown_key

Path = tuple[str, ...]
"""The fields that lead to one, from the request on, each with its place in a list or a map: `graders['a']`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fields:
    """Fields of one message type, by name: those that name resources, and those of messages that may hold such."""

    naming: tuple[FieldDescriptor, ...]
    holding: tuple[FieldDescriptor, ...]


def subject_field(request: Descriptor) -> str:
    """Return the field that says what requests of a type are about: `name`, `parent` or `dataset.name`; empty: none.

    Raises AssertionError where several could.
    """
    found = [name for name in ("name", "parent") if _is_text(request, name)]
    if request.name.startswith("Update"):
        updated = [field for field in request.fields if _is_resource(field.message_type)]
        found += [f"{field.name}.name" for field in updated if not field.is_repeated]
    assert len(found) < 2, f"{request.full_name} must be about one thing, it has {', '.join(found)}"
    return found[0] if found else ""


def field_at(request: Descriptor, path: str) -> FieldDescriptor | None:
    """Return the field at a path of a request type (`dataset.name`); None where there is no such field."""
    *holders, last = path.split(".")
    descriptor: Descriptor | None = request
    for holder in holders:
        held = None if descriptor is None else descriptor.fields_by_name.get(holder)
        descriptor = None if held is None else held.message_type
    return None if descriptor is None else descriptor.fields_by_name.get(last)


def subject_of(request: Message, field: str) -> str:
    """Return what a request is about, as its field at a path says (`dataset.name`); empty: it does not say."""
    *holders, last = field.split(".")
    for holder in holders:
        request = getattr(request, holder)
    return str(getattr(request, last)) if last else ""


def form_of(request: Message, field: str) -> str:
    """Return what names in a field look like, `projects/{project}/datasets/{dataset}`; empty: no proto says so."""
    described: Any = request.DESCRIPTOR
    found = field_at(described, field)
    if found is None:
        return ""
    holder = found.containing_type
    if holder is not None and _is_resource(holder):
        return str(holder.GetOptions().Extensions[resource_pb2.resource].pattern[0])
    return _forms(request.DESCRIPTOR.file).get(
        found.GetOptions().Extensions[resource_pb2.resource_reference].type, ""
    )


def references_of(request: Message, subject: str) -> Iterable[tuple[Path, str]]:
    """Return the path and the value of every field of a request that names a resource, however deep, but its subject.

    `subject` is the field that names what it is about; empty: none does. Paths are in parts, which `".".join` makes
    text of: a request may name very many.
    """
    fields = _fields(request.DESCRIPTOR)
    if not fields.holding and all(field.name == subject for field in fields.naming):
        return ()
    about = tuple(subject.split("."))
    return (named for named in _names(request, ()) if named[0] != about)


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


def _is_text(descriptor: Descriptor, name: str) -> bool:
    field = descriptor.fields_by_name.get(name)
    return field is not None and field.type == FieldDescriptor.TYPE_STRING and not field.is_repeated


def _is_resource(descriptor: Descriptor | None) -> bool:
    return descriptor is not None and descriptor.GetOptions().HasExtension(resource_pb2.resource)


@lru_cache(maxsize=64)
def _forms(file: FileDescriptor) -> Mapping[str, str]:
    """Return the pattern of each type of resource that a file, or one that it imports, tells of."""
    found = [one for here in (file, *file.dependencies) for one in here.message_types_by_name.values()]
    options = [one.GetOptions().Extensions[resource_pb2.resource] for one in found if _is_resource(one)]
    return {one.type: one.pattern[0] for one in options}


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
