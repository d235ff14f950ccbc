"""Dataclasses to JSON and back, for columns that hold them."""

import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import is_dataclass
from typing import Any, Generic, TypeVar, Union, get_args, get_origin, get_type_hints

from cattrs import Converter
from cattrs.preconf.json import make_converter

T = TypeVar("T")

TAG = "@type"
"""Key that names the class of a value declared as a union of dataclasses."""


def json_converter() -> Converter:
    """Return a converter to and from what `json` can hold.

    Dataclasses, enums, aware datetimes, tuples, mappings, Optional; a value declared as a union of
    dataclasses carries its class name under `@type`. Unknown keys are refused, so that what a newer version
    wrote is not read as if it were older.
    """
    converter = make_converter(forbid_extra_keys=True)
    converter.register_unstructure_hook_factory(_is_union_of_dataclasses, _union_writer(converter))
    converter.register_structure_hook_factory(_is_union_of_dataclasses, _union_reader(converter))
    return converter


class Bodies(Generic[T]):
    """Chosen fields of one dataclass as JSON."""

    def __init__(self, type_: type[T], names: Iterable[str]) -> None:
        hints = get_type_hints(type_)
        self._type = type_
        self._hints = hints
        self._names = tuple(sorted(names))
        self._converter = json_converter()
        self._structure = {
            name: self._converter.get_structure_hook(hint) for name, hint in hints.items() if hint is not str
        }

    def to_json(self, value: T) -> dict[str, Any]:
        """Return the chosen fields as JSON values."""
        return {
            name: self._converter.unstructure(getattr(value, name), self._hints[name]) for name in self._names
        }

    def from_json(self, body: Mapping[str, Any], others: Mapping[str, Any]) -> T:
        """Return the dataclass whose chosen fields are in `body` and whose other fields are in `others`.

        A field that `body` lacks takes the dataclass's default: it was added after the row was written.
        """
        values = dict(others)
        values.update((name, body[name]) for name in self._names if name in body)
        for name, structure in self._structure.items():
            if name in body or isinstance(values.get(name), str):
                values[name] = structure(values[name], self._hints[name])
        return self._type(**values)


def _members(declared: Any) -> tuple[Any, ...]:
    return tuple(member for member in get_args(declared) if member is not types.NoneType)


def _is_union_of_dataclasses(declared: Any) -> bool:
    if get_origin(declared) not in (Union, types.UnionType):
        return False
    members = _members(declared)
    return len(members) > 1 and all(is_dataclass(member) for member in members)


def _union_writer(converter: Converter) -> Callable[[Any], Callable[[Any], Any]]:
    def factory(_declared: Any) -> Callable[[Any], Any]:
        def write(value: Any) -> Any:
            if value is None:
                return None
            return {TAG: type(value).__name__} | converter.unstructure(value, type(value))

        return write

    return factory


def _union_reader(converter: Converter) -> Callable[[Any], Callable[[Any, Any], Any]]:
    def factory(declared: Any) -> Callable[[Any, Any], Any]:
        by_name = {member.__name__: member for member in _members(declared)}

        def read(value: Any, _: Any) -> Any:
            if value is None:
                return None
            rest = {key: item for key, item in value.items() if key != TAG}
            return converter.structure(rest, by_name[value[TAG]])

        return read

    return factory
