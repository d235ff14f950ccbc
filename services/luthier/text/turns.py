"""Turns as chat templates see them: a tool call's arguments are an object, as templates of today expect.

OpenAI writes the arguments as JSON text. A template that writes `arguments | tojson` would make a quoted string of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_SHOWN_CHARACTERS = 60


class _Arguments(dict[str, Any]):
    """A call's arguments: an object for templates, and JSON for those that join it to text."""

    def __init__(self, values: Mapping[str, Any], text: str) -> None:
        super().__init__(values)
        self._text = text

    def __str__(self) -> str:
        return self._text

    def __add__(self, other: object) -> str:
        return self._text + other if isinstance(other, str) else NotImplemented

    def __radd__(self, other: object) -> str:
        return other + self._text if isinstance(other, str) else NotImplemented


def template_turns(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return messages with the arguments of their tool calls as objects; what is no JSON object stays as it is."""
    return [_turn(message) for message in messages]


def text_arguments(messages: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, str]]:
    """Yield the message and the arguments of each tool call whose arguments are text but no JSON object."""
    for index, message in enumerate(messages):
        for call in _calls(message):
            given = _function(call).get("arguments")
            if isinstance(given, str) and not isinstance(_arguments(given), _Arguments):
                yield index, given[:_SHOWN_CHARACTERS]


def _turn(message: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(message.get("tool_calls"), list | tuple):
        return dict(message)
    return {**message, "tool_calls": [_call(call) for call in message["tool_calls"]]}


def _call(call: Any) -> Any:
    if not isinstance(call, Mapping) or "arguments" not in _function(call):
        return call
    function = {**_function(call), "arguments": _arguments(_function(call)["arguments"])}
    return {**call, "function": function} if isinstance(call.get("function"), Mapping) else function


def _calls(message: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    calls = message.get("tool_calls")
    return [call for call in calls if isinstance(call, Mapping)] if isinstance(calls, list | tuple) else []


def _function(call: Mapping[str, Any]) -> Mapping[str, Any]:
    function = call.get("function")
    return function if isinstance(function, Mapping) else call


def _arguments(given: Any) -> Any:
    if isinstance(given, Mapping):
        return _Arguments(given, json.dumps(given, ensure_ascii=False))
    if not isinstance(given, str):
        return given
    try:
        values = json.loads(given, parse_constant=_refuse_constant, object_pairs_hook=_distinct)
        json.dumps(values, ensure_ascii=False).encode()  # a lone surrogate is escaped in the text only
    except (ValueError, RecursionError):
        return given
    return _Arguments(values, given) if isinstance(values, dict) else given


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a key is there twice")
    return values
