"""The kinds of resources that the public API has, by its protos: whoever adds one adds it to the lives of all."""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator
from importlib import import_module
from typing import Any

from google.api import resource_pb2
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import Message

import luthier.v1


def kinds() -> set[str]:
    """The types of all resources; of those that are made in several ways, as models are, each of their kinds."""
    return {kind for descriptor in _messages() if _type(descriptor) for kind in _kinds_of(descriptor)}


def kind_of(resource: Message) -> str:
    """The kind of one resource, or the full name of a message that is none."""
    descriptor: Any = resource.DESCRIPTOR
    made = descriptor.enum_types_by_name.get("Kind")
    if made is None:
        return _type(descriptor) or str(descriptor.full_name)
    return f"{_type(descriptor)} {made.values_by_number[resource.kind].name}"  # type: ignore[attr-defined]


def _messages() -> Iterator[Descriptor]:
    for module in pkgutil.iter_modules(luthier.v1.__path__, "luthier.v1."):
        if module.name.endswith("_pb2"):
            yield from import_module(module.name).DESCRIPTOR.message_types_by_name.values()


def _kinds_of(descriptor: Any) -> list[str]:
    made = descriptor.enum_types_by_name.get("Kind")
    if made is None:
        return [_type(descriptor)]
    return [f"{_type(descriptor)} {value.name}" for value in made.values if value.number]


def _type(descriptor: Any) -> str:
    return str(descriptor.GetOptions().Extensions[resource_pb2.resource].type)
