"""The environment that templates run in: what they write depends on their arguments alone.

Nothing random reaches a template, no clock, no order of a set and no address of an object. Objects of Python's show
where they lie in memory when they are written as text, unless they have a text of their own: functions, methods and
iterators. Wherever a template can get one it gets a stand-in, which can be called or gone through and has no text.
"""

from __future__ import annotations

import functools
import pprint
from collections.abc import Callable, Iterator, Mapping
from types import NoneType
from typing import Any, NoReturn

import jinja2.exceptions
import jinja2.runtime
import jinja2.sandbox
import jinja2.utils

_PLAIN = frozenset({str, bool, int, float, list, dict, tuple, NoneType})
"""Most of what templates touch. What these hold is looked at when it is taken out."""


_OF_DICTS = frozenset(dir(dict))


class _Textless:
    """Has no text, whatever asks for it: output, filters, formats, the text of a list that it is in."""

    __slots__ = ()

    def __repr__(self) -> NoReturn:
        raise jinja2.exceptions.TemplateError(
            "it writes the address of an object, which is another each time: call it, or write its values, e.g. by the "
            "filters list or tojson"
        )


_AS_THEY_ARE = (_Textless, jinja2.runtime.Macro, jinja2.runtime.LoopContext, jinja2.runtime.Undefined, type)
"""What can be called or gone through and needs no stand-in: all but the first have a text of their own."""


class Unwritten(_Textless):
    """Stands for a function or a method: it can be called."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, /, *arguments: Any, **named: Any) -> Any:
        """Call it."""
        return self._function(*arguments, **named)


class _Passing(_Textless):
    """Stands for an iterator."""

    __slots__ = ("_values",)

    def __init__(self, values: Iterator[Any]) -> None:
        self._values = values

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return next(self._values)


class _Cycler(_Textless, jinja2.utils.Cycler):
    pass


class _Joiner(_Textless, jinja2.utils.Joiner):
    pass


class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """jinja2's sandbox, in which nothing shows an address, and the difference of two views keeps the dict's order."""

    intercepted_binops = frozenset({"-"})

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        for name, function in self.filters.items():
            self.filters[name] = _without_iterators(function)
        self.filters["random"] = _refuse_random
        self.filters["pprint"] = _pprint
        self.globals["range"] = Unwritten(jinja2.sandbox.safe_range)
        self.globals["lipsum"] = Unwritten(_refuse_lipsum)
        self.globals["cycler"] = _Cycler
        self.globals["joiner"] = _Joiner

    def getattr(self, obj: Any, attribute: str) -> Any:
        """Return an attribute, or an item where there is none; what has no text but an address has none at all."""
        if type(obj) is dict and attribute in obj and attribute not in _OF_DICTS:
            found = obj[attribute]  # most of what templates get
        else:
            found = super().getattr(_stood_for(obj), attribute)
        return found if type(found) in _PLAIN else _written_off(found)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """Return an item, or an attribute where there is none; as `getattr`."""
        found = super().getitem(_stood_for(obj), argument)
        return found if type(found) in _PLAIN else _written_off(found)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Tell whether a template may have an attribute: of a class none that changes what is not the template's."""
        if isinstance(obj, type):
            return attr == "fromkeys"
        return super().is_safe_attribute(obj, attr, value)

    def is_safe_callable(self, obj: Any) -> bool:
        """Tell whether a template may call something."""
        return super().is_safe_callable(_stood_for(obj))

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        """Return what the operator gives; of a set, whose order differs between processes, a view in order."""
        found = super().call_binop(context, operator, left, right)
        if isinstance(found, set | frozenset):
            return dict.fromkeys(item for item in left if item in found).keys()
        return found


def _written_off(value: Any) -> Any:
    """Return a value, or what stands for it where its text would be its address."""
    if isinstance(value, _AS_THEY_ARE):
        return value
    if isinstance(value, Iterator):
        return _Passing(value)
    return Unwritten(value) if callable(value) else value


def _stood_for(value: Any) -> Any:
    if isinstance(value, Unwritten):
        return value._function
    return value._values if isinstance(value, _Passing) else value


def _without_iterators(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a filter whose result has a text of its own, or none."""

    @functools.wraps(function)  # with it what jinja2 passes to it
    def filtered(*arguments: Any, **named: Any) -> Any:
        found = function(*arguments, **named)
        return found if type(found) in _PLAIN else _written_off(found)

    return filtered


def _pprint(value: object) -> str:
    """Do what jinja2's filter does, but for keys of which none is less: Python orders those by their addresses."""
    _require_order(value)
    return pprint.pformat(value)


def _require_order(value: object) -> None:
    if isinstance(value, Mapping):
        try:
            sorted(value)
        except TypeError as error:
            raise jinja2.exceptions.TemplateError(
                "pprint cannot put keys in order of which none is less, use tojson"
            ) from error
        value = list(value.values())
    if isinstance(value, list | tuple):
        for one in value:
            _require_order(one)


def _refuse_random(_: object) -> NoReturn:
    raise jinja2.exceptions.TemplateError("the filter random is not there: a rendering must be repeatable")


def _refuse_lipsum(*_: object, **__: object) -> NoReturn:
    raise jinja2.exceptions.TemplateError(
        "lipsum is not there: it writes random text, a rendering must be repeatable"
    )
