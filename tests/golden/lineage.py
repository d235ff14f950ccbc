"""Which fields of resources name other resources, by their descriptors, and what stands there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from google.api import resource_pb2
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from tests.golden.answers import Asker, rpcs

_LIST_DATASETS = "luthier.v1.DataService/ListDatasets"


def _is_reference(field: FieldDescriptor) -> bool:
    return bool(field.GetOptions().Extensions[resource_pb2.resource_reference].type)


def _inner_messages(descriptor: Any) -> dict[str, Descriptor]:
    """Return the types of the fields of a message that hold others, by the fields' names; maps hold none."""
    types = {field.name: field.message_type for field in descriptor.fields if field.message_type is not None}
    return {
        name: inner
        for name, inner in types.items()
        if inner.full_name.startswith("luthier.") and not inner.GetOptions().map_entry
    }


def referring_fields(descriptor: Any) -> set[str]:
    """Return the fields of a message, and of those in it, that name other resources."""
    found = {field.full_name for field in descriptor.fields if _is_reference(field)}
    return found.union(*(referring_fields(inner) for inner in _inner_messages(descriptor).values()))


def referred_names(message: Message) -> Iterator[tuple[str, str]]:
    """Yield each field of a message, and of those in it, that names another resource, and the name."""
    inner = _inner_messages(message.DESCRIPTOR)
    for field, held in message.ListFields():
        many = held if field.is_repeated else [held]
        if _is_reference(field):
            yield from ((field.full_name, name) for name in many)
        elif field.name in inner:
            for one in many:
                yield from referred_names(one)


def derived_resources(asker: Asker, project: str) -> Iterator[tuple[str, Any]]:
    """Yield each resource of a project that is made from others, behind the service that has it."""
    datasets = [one.name for one in asker.send(_LIST_DATASETS, {"parent": project}).datasets]
    for rpc, (process, method) in rpcs().items():
        for field in method.output_type.fields if method.name.startswith("List") else ():
            listed = field.message_type
            if listed is None or "references" not in listed.fields_by_name:
                continue
            for parent in datasets if listed.name == "DatasetVersion" else [project]:
                page = asker.send(rpc, {"parent": parent, "pageSize": 1000})
                yield from ((process, one) for one in getattr(page, field.name))
