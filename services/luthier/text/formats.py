"""The formats that examples come in: recognised by their keys, read strictly into canonical records."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from typing import Any

from luthier.text.records import ChatRecord, CompletionRecord, Message, Record

ROLES = ("system", "developer", "user", "assistant", "tool")
MAX_VALUE_CHARACTERS = 200


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
_MESSAGE_KEYS = frozenset({"role", "content", "weight", "name", "tool_calls", "tool_call_id"})


class RecordError(ValueError):
    """What is wrong with one record.

    Attributes:
        path: where in the record, e.g. messages[2].role; empty for the record as a whole.
        reason: code that a program can switch on, e.g. MISSING_FIELD.
        message: what is wrong and what would be right.
        value: the offending value, shortened.
    """

    def __init__(self, path: str, reason: str, message: str, value: object = None) -> None:
        super().__init__(f"{path}: {message}" if path else message)
        self.path = path
        self.reason = reason
        self.message = message
        self.value = "" if value is None else repr(value)[:MAX_VALUE_CHARACTERS]


class UnknownFormatError(ValueError):
    """The records have the keys of no format; the message names the keys found and those known."""


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
    found = ", ".join(sorted(map(str, first))) if isinstance(first, Mapping) else type(first).__name__
    known = "; ".join(f"{name}: {', '.join(sorted(keys[0]))}" for name, keys in _KEYS.items())
    raise UnknownFormatError(f"no known format has the keys found ({found}); known are {known}")


def parse_record(value: object, format_: Format) -> Record:
    """Read one JSON value as a record.

    Raises:
        RecordError: the first thing that is wrong with it.
    """
    if not isinstance(value, Mapping):
        raise RecordError("", "WRONG_TYPE", f"a record must be a JSON object, got {_kind(value)}", value)
    required, optional = _KEYS[format_]
    for key in sorted(required):
        if key not in value:
            raise RecordError(key, "MISSING_FIELD", f"must be there; the record has {sorted(value)}")
    for key in value:
        if key not in required | optional:
            allowed = ", ".join(sorted(required | optional))
            raise RecordError(str(key), "UNKNOWN_FIELD", f"must be one of {allowed}, got {key!r}", value[key])
    return _PARSERS[format_](value)


def _parse_chat(value: Mapping[str, Any]) -> ChatRecord:
    messages = value["messages"]
    if not isinstance(messages, list) or not messages:
        raise RecordError("messages", "WRONG_TYPE", "must be a list with at least one message", messages)
    if "functions" in value:
        raise RecordError("functions", "UNKNOWN_FIELD", "is out of date; use tools", value["functions"])
    parsed = tuple(_parse_message(message, f"messages[{index}]") for index, message in enumerate(messages))
    _check_order(parsed)
    return ChatRecord(messages=parsed, tools=_objects(value.get("tools"), "tools"))


def _parse_message(value: object, path: str) -> Message:
    if not isinstance(value, Mapping):
        raise RecordError(path, "WRONG_TYPE", f"must be a JSON object, got {_kind(value)}", value)
    for key in value:
        if key not in _MESSAGE_KEYS:
            allowed = ", ".join(sorted(_MESSAGE_KEYS))
            raise RecordError(f"{path}.{key}", "UNKNOWN_FIELD", f"must be one of {allowed}, got {key!r}")
    role = value.get("role")
    if role not in ROLES:
        reason = "MISSING_FIELD" if role is None else "UNKNOWN_ROLE"
        raise RecordError(f"{path}.role", reason, f"must be one of {', '.join(ROLES)}, got {role!r}", role)
    tool_calls = _objects(value.get("tool_calls"), f"{path}.tool_calls")
    if tool_calls and role != "assistant":
        raise RecordError(f"{path}.tool_calls", "WRONG_ROLE", f"only an assistant calls tools, not {role}")
    return Message(
        role=role,
        content=_content(value.get("content"), f"{path}.content", may_be_empty=bool(tool_calls)),
        weight=_weight(value.get("weight"), role, f"{path}.weight"),
        name=_optional_text(value.get("name"), f"{path}.name"),
        tool_calls=tool_calls,
        tool_call_id=_optional_text(value.get("tool_call_id"), f"{path}.tool_call_id"),
    )


def _content(value: object, path: str, *, may_be_empty: bool) -> str:
    """Read text, or OpenAI's list of text parts."""
    if isinstance(value, list):
        parts = [part.get("text") if isinstance(part, Mapping) else None for part in value]
        if not all(isinstance(part, str) for part in parts):
            raise RecordError(path, "WRONG_TYPE", "every part must be {type: text, text: ...}", value)
        value = "".join(str(part) for part in parts)
    if value is None and may_be_empty:
        return ""
    if not isinstance(value, str):
        reason = "MISSING_FIELD" if value is None else "WRONG_TYPE"
        raise RecordError(path, reason, f"must be text, got {_kind(value)}", value)
    if not value.strip() and not may_be_empty:
        raise RecordError(path, "EMPTY_FIELD", "must not be empty", value)
    return value


def _weight(value: object, role: str, path: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or value not in (0, 1):
        raise RecordError(path, "WRONG_VALUE", f"must be 0 or 1, got {value!r}", value)
    if role != "assistant":
        raise RecordError(path, "WRONG_ROLE", f"only assistant turns have a weight, not {role}", value)
    return float(value)


def _check_order(messages: Sequence[Message]) -> None:
    previous = ""
    for index, message in enumerate(messages):
        path, role = f"messages[{index}].role", message.role
        if role in ("system", "developer") and index > 0:
            raise RecordError(path, "WRONG_ROLE_ORDER", f"{role} must come first, got it at {index}", role)
        if role == "user" and previous == "user":
            raise RecordError(path, "WRONG_ROLE_ORDER", "user must be followed by assistant, got user", role)
        if role == "assistant" and previous in ("", "system", "developer"):
            raise RecordError(path, "WRONG_ROLE_ORDER", "assistant must follow user, got it first", role)
        calls_before = index > 0 and (messages[index - 1].tool_calls or previous == "tool")
        if role == "tool" and not calls_before:
            raise RecordError(path, "WRONG_ROLE_ORDER", "tool must follow an assistant that calls it", role)
        previous = role
    if previous != "assistant":
        path = f"messages[{len(messages) - 1}].role"
        raise RecordError(
            path, "WRONG_ROLE_ORDER", f"the last turn must be assistant, got {previous}", previous
        )


def _parse_completion(value: Mapping[str, Any]) -> CompletionRecord:
    prompt, completion = value["prompt"], value["completion"]
    if not isinstance(prompt, str):
        raise RecordError("prompt", "WRONG_TYPE", f"must be text, got {_kind(prompt)}", prompt)
    return CompletionRecord(prompt=prompt, completion=_content(completion, "completion", may_be_empty=False))


def _parse_alpaca(value: Mapping[str, Any]) -> ChatRecord:
    instruction = _content(value["instruction"], "instruction", may_be_empty=False)
    given = _optional_text(value.get("input"), "input") or ""
    output = _content(value["output"], "output", may_be_empty=False)
    messages: list[Message] = []
    system = _optional_text(value.get("system"), "system")
    if system:
        messages.append(Message(role="system", content=_content(system, "system", may_be_empty=False)))
    history = value.get("history")
    if history is not None and not isinstance(history, list):
        problem = f"must be a list of [question, answer], got {_kind(history)}"
        raise RecordError("history", "WRONG_TYPE", problem, history)
    for index, turn in enumerate(history or ()):
        if not (isinstance(turn, list) and len(turn) == 2):
            raise RecordError(f"history[{index}]", "WRONG_TYPE", "must be [question, answer]", turn)
        for role, text in zip(("user", "assistant"), turn, strict=True):
            content = _content(text, f"history[{index}]", may_be_empty=False)
            messages.append(Message(role=role, content=content))
    question = f"{instruction}\n\n{given}" if given.strip() else instruction
    messages.append(Message(role="user", content=question))
    messages.append(Message(role="assistant", content=output))
    return ChatRecord(messages=tuple(messages))


def _objects(value: object, path: str) -> tuple[Mapping[str, Any], ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
        raise RecordError(path, "WRONG_TYPE", f"must be a list of JSON objects, got {_kind(value)}", value)
    return tuple(value)


def _optional_text(value: object, path: str) -> str | None:
    if value is None or isinstance(value, str):
        return value
    raise RecordError(path, "WRONG_TYPE", f"must be text, got {_kind(value)}", value)


def _kind(value: object) -> str:
    if isinstance(value, Mapping):
        return "an object"
    names = {
        type(None): "null",
        bool: "a boolean",
        int: "a number",
        float: "a number",
        str: "text",
        list: "a list",
    }
    return names.get(type(value), type(value).__name__)


_PARSERS: Mapping[Format, Callable[[Mapping[str, Any]], Record]] = {
    Format.OPENAI_CHAT: _parse_chat,
    Format.PROMPT_COMPLETION: _parse_completion,
    Format.ALPACA: _parse_alpaca,
}
