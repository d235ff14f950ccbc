"""The formats that examples come in: recognised by their keys, read strictly into canonical records."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import StrEnum
from typing import Any

from luthier.text.fields import RecordError, kind, optional_text, required_text
from luthier.text.foreign import named_shape
from luthier.text.openai_chat import parse_chat
from luthier.text.records import ChatRecord, CompletionRecord, Message, Record

_SHOWN_KEYS = 20
_SHOWN_CHARACTERS = 60


class Format(StrEnum):
    """Shape of the records of a file."""

    OPENAI_CHAT = "OPENAI_CHAT"
    PROMPT_COMPLETION = "PROMPT_COMPLETION"
    ALPACA = "ALPACA"


_KEYS: Mapping[Format, tuple[frozenset[str], frozenset[str]]] = {
    Format.OPENAI_CHAT: (
        frozenset({"messages"}),
        frozenset({"tools", "parallel_tool_calls", "functions", "metadata"}),
    ),
    Format.PROMPT_COMPLETION: (frozenset({"prompt", "completion"}), frozenset()),
    Format.ALPACA: (frozenset({"instruction", "output"}), frozenset({"input", "system", "history"})),
}


class UnknownFormatError(ValueError):
    """The records have the keys of no format.

    The message names the keys found, what they are elsewhere where that is known, and the formats known here.
    """


def detect(objects: Sequence[object]) -> Format:
    """Return the format whose required keys the first record has.

    Raises:
        UnknownFormatError: no format fits, or there is no record.
    """
    for record in objects:
        keys = set(record) if isinstance(record, Mapping) else set()
        for format_, (required, _) in _KEYS.items():
            if required <= keys:
                return format_
    first = objects[0] if objects else None
    found = _shown(first) if isinstance(first, Mapping) else type(first).__name__
    known = "; ".join(f"{name}: {', '.join(sorted(keys[0]))}" for name, keys in _KEYS.items())
    shape = next(filter(None, map(named_shape, objects)), None)
    advice = f"; this looks like {shape}" if shape else ""
    raise UnknownFormatError(f"no known format has the keys found ({found}){advice}; known are {known}")


def _shown(keys: Iterable[str]) -> str:
    """Return keys as a message can hold them: the first ones, shortened, nothing in them that steers a terminal."""
    names = sorted(keys)
    short = [
        key if len(key) <= _SHOWN_CHARACTERS else f"{key[:_SHOWN_CHARACTERS]}…" for key in names[:_SHOWN_KEYS]
    ]
    more = [f"and {len(names) - _SHOWN_KEYS} more"] if len(names) > _SHOWN_KEYS else []
    return ", ".join([*(key if key.isprintable() else repr(key) for key in short), *more])


def parse_record(value: object, format_: Format) -> Record:
    """Read one JSON value as a record.

    Raises:
        RecordError: the first thing that is wrong with it.
    """
    if not isinstance(value, Mapping):
        raise RecordError("", "WRONG_TYPE", f"a record must be a JSON object, got {kind(value)}", value)
    required, optional = _KEYS[format_]
    for key in sorted(required):
        if key not in value:
            shape = named_shape(value)
            advice = f"; this looks like {shape}" if shape else ""
            raise RecordError(key, "MISSING_FIELD", f"must be there; the record has {_shown(value)}{advice}")
    for key in value:
        if key not in required | optional:
            allowed = ", ".join(sorted(required | optional))
            raise RecordError(str(key), "UNKNOWN_FIELD", f"must be one of {allowed}, got {key!r}", value[key])
    return _PARSERS[format_](value)


def _parse_completion(value: Mapping[str, Any]) -> CompletionRecord:
    prompt, completion = value["prompt"], value["completion"]
    if not isinstance(prompt, str):
        raise RecordError("prompt", "WRONG_TYPE", f"must be text, got {kind(prompt)}", prompt)
    return CompletionRecord(prompt=prompt, completion=required_text(completion, "completion"))


def _parse_alpaca(value: Mapping[str, Any]) -> ChatRecord:
    instruction = required_text(value["instruction"], "instruction")
    given = optional_text(value.get("input"), "input") or ""
    output = required_text(value["output"], "output")
    messages: list[Message] = []
    system = optional_text(value.get("system"), "system")
    if system:
        messages.append(Message(role="system", content=required_text(system, "system")))
    history = value.get("history")
    if history is not None and not isinstance(history, list):
        problem = f"must be a list of [question, answer], got {kind(history)}"
        raise RecordError("history", "WRONG_TYPE", problem, history)
    for index, turn in enumerate(history or ()):
        if not (isinstance(turn, list) and len(turn) == 2):
            raise RecordError(f"history[{index}]", "WRONG_TYPE", "must be [question, answer]", turn)
        for role, text in zip(("user", "assistant"), turn, strict=True):
            content = required_text(text, f"history[{index}]")
            messages.append(Message(role=role, content=content))
    question = f"{instruction}\n\n{given}" if given.strip() else instruction
    messages.append(Message(role="user", content=question))
    messages.append(Message(role="assistant", content=output))
    return ChatRecord(messages=tuple(messages))


_PARSERS: Mapping[Format, Callable[[Mapping[str, Any]], Record]] = {
    Format.OPENAI_CHAT: parse_chat,
    Format.PROMPT_COMPLETION: _parse_completion,
    Format.ALPACA: _parse_alpaca,
}

__all__ = ["Format", "RecordError", "UnknownFormatError", "detect", "parse_record"]
