"""Messages as people write them: YAML or JSON, and assignments `path=value`.

One walk over the descriptors, for every message that there is and will be. Names are those of the proto file; the
lowerCamelCase of proto JSON is taken too. A field's type says how its value is read: in a string `no`, `1.10` and
`2026-11-28` are the text that stands there, `1e-4` is a number where one is wanted, and nothing else is guessed.
Enum values go by name, with or without the name of their type: `cosine` for LEARNING_RATE_SCHEDULE_COSINE.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar, cast

from google.protobuf import json_format
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from luthier.client.documents import Mapping, Node, Scalar, Sequence, read_document, shown
from luthier.client.field_values import (
    Value,
    described,
    is_identifier,
    is_map,
    is_output_only,
    plain_value,
    read_value,
)
from luthier.errors import FieldViolation, InvalidArgument

M = TypeVar("M", bound=Message)
_MAX_PROBLEMS = 20
_MAX_SUGGESTED_DEPTH = 4
_NAME = re.compile(r"[^.\[]+")
_ELEMENT = re.compile(r"(?:\[(\d{0,6})\]|\.(\d{1,6}))(?:\.(.+))?", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading(Generic[M]):
    """A message, and the paths of what was passed over because it is the service's to write.

    The resource's name is among those paths, and in the message all the same: who creates ignores it.
    """

    message: M
    ignored: tuple[str, ...]


def read_message(data: bytes, kind: type[M], *, source: str) -> Reading[M]:
    """Read a message from YAML or JSON; what `luthier --json` prints is taken. `source` names the file in errors.

    Raises InvalidArgument that names file, line, path and value of each thing that is wrong, and what would be right:
    unknown fields and enum values, values of another type, fields given twice, two fields of a oneof.
    """
    message = kind()
    writer = _Writer(message)
    writer.fill(message, read_document(data, source), "")
    writer.raise_problems()
    return Reading(message=message, ignored=tuple(writer.ignored))


def assign(message: Message, path: str, text: str, *, source: str) -> None:
    """Set one field by its path: `lora.rank`, `labels.team`, `arms[0].model`, `metrics[]` (one more element).

    A string is taken as it is; a list, map or message is read as YAML or JSON and replaces what was there; `null`
    unsets. Raises InvalidArgument as `read_message` does, and for what is the service's to write.
    """
    writer = _Writer(message)
    writer.assign(message, path, _Assigned(text=text, source=source), "")
    writer.raise_problems()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Assigned:
    text: str
    source: str

    def scalar(self, field: FieldDescriptor) -> Scalar:
        is_text = field.cpp_type == FieldDescriptor.CPPTYPE_STRING
        return Scalar(where=self.source, text=self.text, style="quoted" if is_text else "json")

    def node(self, field: FieldDescriptor) -> Node:
        if field.is_repeated or field.message_type is not None:
            return read_document(self.text.encode("utf-8", "surrogateescape"), self.source)
        return self.scalar(field)


class _Writer:
    """Writes nodes into messages; gathers what is wrong and what is passed over."""

    def __init__(self, root: Message) -> None:
        self.ignored: list[str] = []
        self._root = _type(root)
        self._problems: list[InvalidArgument] = []

    def raise_problems(self) -> None:
        if len(self._problems) == 1:
            raise self._problems[0]
        if self._problems:
            kept = self._problems[:_MAX_PROBLEMS]
            message = "\n".join(problem.message for problem in kept)
            raise InvalidArgument(message, violations=[one for problem in kept for one in problem.violations])

    def fill(self, message: Message, node: Node, path: str) -> None:
        if not isinstance(node, Mapping):
            raise _wrong(node.where, path, f"must be the fields of one {_type(message).name}, got {node}")
        seen: dict[str, Scalar] = {}
        for key, value in node.pairs:
            with self._gathering():
                field = self._field(_type(message), key, path)
                below = _below(path, field.name)
                _check_once(seen, field, key, value, below)
                self._write(message, field, value, below)

    def assign(self, message: Message, rest: str, assigned: _Assigned, path: str) -> None:
        name = _NAME.match(rest)
        if name is None:
            raise _wrong(
                assigned.source, path, f"must be a path such as lora.rank or labels.team, got {shown(rest)}"
            )
        rest = rest[name.end() :]
        key = Scalar(where=assigned.source, text=name[0], style="plain")
        field = self._field(_type(message), key, path)
        path = _below(path, field.name)
        if is_output_only(field) or is_identifier(field):
            right = "the name is given apart" if is_identifier(field) else "the service writes it"
            raise _wrong(assigned.source, path, f"cannot be set: {right}")
        if not rest:
            self._write(message, field, assigned.node(field), path)
        elif is_map(field) and rest.startswith("."):
            self._assign_entry(getattr(message, field.name), field, rest[1:], assigned, path)
        elif field.is_repeated and not is_map(field) and (element := _ELEMENT.fullmatch(rest)):
            self._assign_element(getattr(message, field.name), field, element, assigned, path)
        elif rest.startswith(".") and _has_fields(field) and not field.is_repeated:
            self.assign(getattr(message, field.name), rest[1:], assigned, path)
        else:
            raise _wrong(assigned.source, path, f"is {described(field)}, got {shown(rest)} behind it")

    def _assign_entry(
        self, entries: Any, field: FieldDescriptor, key: str, assigned: _Assigned, path: str
    ) -> None:
        of_key, of_value = _map_fields(field)
        below = ""
        if _has_fields(of_value):
            key, _, below = key.partition(".")
        path = _below(path, key)
        made = _key(of_key, Scalar(where=assigned.source, text=key, style="quoted"), path)
        if below:
            self.assign(entries[made], below, assigned, path)
        elif of_value.message_type is not None:
            self._write_message(entries[made], assigned.node(of_value), path)
        else:
            entries[made] = _scalar(of_value, assigned.scalar(of_value), path)

    def _assign_element(
        self, elements: Any, field: FieldDescriptor, element: re.Match[str], assigned: _Assigned, path: str
    ) -> None:
        digits = element[1] or element[2]
        index = int(digits) if digits else len(elements)
        if index > len(elements):
            problem = f"has {len(elements)} elements: the next one is [{len(elements)}] or [], got [{digits}]"
            raise _wrong(assigned.source, path, problem)
        path = f"{path}[{index}]"
        if element[3] and not _has_fields(field):
            raise _wrong(assigned.source, path, f"has nothing below it, got {shown(element[3])}")
        if field.message_type is None:
            value = _scalar(field, assigned.scalar(field), path)
            elements[index : index + 1] = [value]
            return
        one = elements.add() if index == len(elements) else elements[index]
        if element[3]:
            self.assign(one, element[3], assigned, path)
        else:
            one.Clear()
            self._write_message(one, assigned.node(field), path)

    @contextmanager
    def _gathering(self) -> Iterator[None]:
        try:
            yield
        except InvalidArgument as error:
            self._problems.append(error)

    def _write(self, message: Message, field: FieldDescriptor, node: Node, path: str) -> None:
        if is_output_only(field) or is_identifier(field):
            self.ignored.append(path)
        if is_output_only(field):
            return
        message.ClearField(field.name)
        if isinstance(node, Scalar) and node.is_null:
            return
        target = getattr(message, field.name)
        if is_map(field):
            self._write_map(target, field, node, path)
        elif field.is_repeated:
            self._write_list(target, field, node, path)
        elif field.message_type is not None:
            target.SetInParent()
            self._write_message(target, node, path)
        else:
            setattr(message, field.name, _scalar(field, node, path))

    def _write_map(self, entries: Any, field: FieldDescriptor, node: Node, path: str) -> None:
        if not isinstance(node, Mapping):
            raise _wrong(node.where, path, f"must be {described(field)}, got {node}")
        of_key, of_value = _map_fields(field)
        for key, value in node.pairs:
            below = _below(path, key.text)
            with self._gathering():
                made = _key(of_key, key, below)
                if made in entries:
                    raise _wrong(key.where, below, "is given twice")
                if of_value.message_type is not None:
                    self._write_message(entries[made], value, below)
                else:
                    entries[made] = _scalar(of_value, value, below)

    def _write_list(self, elements: Any, field: FieldDescriptor, node: Node, path: str) -> None:
        if not isinstance(node, Sequence):
            raise _wrong(node.where, path, f"must be {described(field)}, got {node}")
        for index, item in enumerate(node.items):
            with self._gathering():
                if field.message_type is not None:
                    self._write_message(elements.add(), item, f"{path}[{index}]")
                else:
                    elements.append(_scalar(field, item, f"{path}[{index}]"))

    def _write_message(self, message: Message, node: Node, path: str) -> None:
        if not message.DESCRIPTOR.full_name.startswith("google.protobuf."):
            self.fill(message, node, path)
            return
        try:
            json_format.ParseDict(plain_value(node), message)
        except (json_format.ParseError, ValueError, TypeError, OverflowError, AttributeError) as error:
            problem = f"must be a {_type(message).name} as proto JSON has it, got {node}: {shown(str(error))}"
            raise _wrong(node.where, path, problem) from error

    def _field(self, descriptor: Descriptor, key: Scalar, path: str) -> FieldDescriptor:
        """Return the field of a key; raise with what may have been meant."""
        for field in descriptor.fields:
            if key.text in (field.name, field.json_name):
                return field
        settable = [field.name for field in _settable(descriptor)]
        near = [one for one in _paths(self._root, "", 1) if one.rpartition(".")[2] == key.text]
        near = near or difflib.get_close_matches(key.text, settable, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"its fields: {', '.join(settable)}"
        raise _wrong(key.where, _below(path, key.text), f"is no field of {descriptor.name}; {hint}")


def _check_once(seen: dict[str, Scalar], field: FieldDescriptor, key: Scalar, value: Node, path: str) -> None:
    """Refuse a field that the mapping already has, and a second field of a oneof."""
    if field.name in seen:
        raise _wrong(key.where, path, f"is given twice, first at {seen[field.name].where}")
    seen[field.name] = key
    group = field.containing_oneof
    if group is None or (isinstance(value, Scalar) and value.is_null):
        return
    # No field has a name with a dot.
    other = seen.setdefault(f".{group.name}", key)
    if other is not key:
        problem = f"excludes {shown(other.text)}, which is given at {other.where}: give one of them"
        raise _wrong(key.where, path, problem)


def _scalar(field: FieldDescriptor, node: Node, path: str) -> Value:
    value = read_value(field, node)
    if value is None:
        raise _wrong(node.where, path, f"must be {described(field, node)}, got {node}")
    return value


def _key(field: FieldDescriptor, key: Scalar, path: str) -> Value:
    """Read a map's key; JSON has quotes around those too that are numbers or truth values."""
    is_text = field.cpp_type == FieldDescriptor.CPPTYPE_STRING
    return _scalar(field, key if is_text else replace(key, style="json"), path)


def _wrong(where: str, path: str, problem: str) -> InvalidArgument:
    violation = FieldViolation(field=path, description=problem)
    return InvalidArgument(f"{where}: {path + ' ' if path else ''}{problem}", violations=[violation])


def _type(message: Message) -> Descriptor:
    return cast(Descriptor, message.DESCRIPTOR)


def _below(path: str, name: str) -> str:
    return f"{path}.{shown(name)}" if path else shown(name)


def _has_fields(field: FieldDescriptor) -> bool:
    """Whether a field holds messages whose fields can be named: not those with a JSON of their own."""
    message = field.message_type
    return message is not None and not message.full_name.startswith("google.protobuf.")


def _map_fields(field: FieldDescriptor) -> tuple[FieldDescriptor, FieldDescriptor]:
    assert field.message_type is not None
    return field.message_type.fields_by_name["key"], field.message_type.fields_by_name["value"]


def _settable(descriptor: Descriptor) -> list[FieldDescriptor]:
    return [field for field in descriptor.fields if not is_output_only(field) and not is_identifier(field)]


def _paths(descriptor: Descriptor, path: str, depth: int) -> Iterator[str]:
    """Yield the paths of all fields that can be set, to a depth."""
    for field in _settable(descriptor):
        below = _below(path, field.name)
        yield below
        inner = field.message_type
        if inner is not None and _has_fields(field) and not is_map(field) and depth < _MAX_SUGGESTED_DEPTH:
            yield from _paths(inner, f"{below}[]" if field.is_repeated else below, depth + 1)
