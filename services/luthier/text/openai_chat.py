"""OpenAI's chat records: all that OpenAI's fine-tuning takes, made canonical.

Null stands for a field that is not there. What is out of date is written as what took its place: `functions` as
`tools`, `function_call` as a tool call, the role `function` as `tool`; a `refusal` is the text of the answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from luthier.text.conversations import (
    Turn,
    call_id_of,
    check_results,
    messages_of,
    require_answer,
    turn_values,
)
from luthier.text.fields import RecordError, kind, objects, optional_text, required_text
from luthier.text.records import ChatRecord, Message

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
MESSAGE_KEYS = frozenset(
    {
        "role",
        "content",
        "weight",
        "name",
        "tool_calls",
        "tool_call_id",
        "refusal",
        "function_call",
        "audio",
        "annotations",
    }
)


def parse_chat(value: Mapping[str, Any]) -> ChatRecord:
    """Read a record with `messages`.

    `parallel_tool_calls`, `metadata` and an answer's `annotations` are read over: templates have no place for them.

    Raises:
        RecordError: the first thing that is wrong with it.
    """
    check_parallel(value.get("parallel_tool_calls"), "parallel_tool_calls")
    turns = ChatReader().read(value["messages"], "messages")
    check_results(turns)
    require_answer(turns)
    return ChatRecord(messages=messages_of(turns), tools=_tools(value))


def check_parallel(value: object, path: str) -> None:
    """Raise RecordError unless it is true, false or null."""
    if not isinstance(value, bool | None):
        raise RecordError(path, "WRONG_TYPE", f"must be true or false, got {kind(value)}", value)


def _tools(value: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    tools, functions = objects(value.get("tools"), "tools"), objects(value.get("functions"), "functions")
    if tools and functions:
        raise RecordError("functions", "WRONG_VALUE", "must not stand beside tools, which took its place")
    return tools or tuple({"type": "function", "function": dict(function)} for function in functions)


class ChatReader:
    """Reads the turns of one conversation; knows the calls of functions so far."""

    def __init__(self) -> None:
        self._call_ids: dict[str, str] = {}
        self._num_turns = 0

    def fork(self) -> ChatReader:
        """Return a reader of what follows the turns read so far; this one stays as it is."""
        made = ChatReader()
        made._call_ids = dict(self._call_ids)
        made._num_turns = self._num_turns
        return made

    def read(self, values: object, path: str) -> tuple[Turn, ...]:
        """Return the turns of a list with at least one. Raises RecordError."""
        found = turn_values(values, path)
        return tuple(self.read_one(value, f"{path}[{index}]") for index, value in enumerate(found))

    def read_one(self, value: object, path: str) -> Turn:
        """Return one turn, which stands at a path by itself. Raises RecordError."""
        turn = Turn(message=self._message(value, path), role_path=f"{path}.role")
        self._num_turns += 1
        return turn

    def _message(self, value: object, path: str) -> Message:
        if not isinstance(value, Mapping):
            raise RecordError(path, "WRONG_TYPE", f"must be a JSON object, got {kind(value)}", value)
        for key in value:
            if key not in MESSAGE_KEYS:
                allowed = ", ".join(sorted(MESSAGE_KEYS))
                raise RecordError(f"{path}.{key}", "UNKNOWN_FIELD", f"must be one of {allowed}, got {key!r}")
        role = value.get("role")
        if role not in ROLES:
            reason = "MISSING_FIELD" if role is None else "UNKNOWN_ROLE"
            raise RecordError(
                f"{path}.role", reason, f"must be one of {', '.join(ROLES)}, got {role!r}", role
            )
        if value.get("audio") is not None:
            raise RecordError(f"{path}.audio", "NOT_TEXT", "must be null: models learn from text alone")
        if role == "function":
            return self._function_result(value, path)
        tool_calls = self._calls(value, role, path)
        return Message(
            role=role,
            content=_content(value, role, path, may_be_empty=bool(tool_calls) or role == "tool"),
            weight=_weight(value.get("weight"), role, f"{path}.weight"),
            name=optional_text(value.get("name"), f"{path}.name"),
            tool_calls=tool_calls,
            tool_call_id=optional_text(value.get("tool_call_id"), f"{path}.tool_call_id"),
        )

    def _calls(self, value: Mapping[str, Any], role: str, path: str) -> tuple[Mapping[str, Any], ...]:
        tool_calls = objects(value.get("tool_calls"), f"{path}.tool_calls")
        call = value.get("function_call")
        for key, found in (("tool_calls", tool_calls), ("function_call", call)):
            if found and role != "assistant":
                raise RecordError(f"{path}.{key}", "WRONG_ROLE", f"only an assistant calls tools, not {role}")
        if call is None:
            return tool_calls
        if tool_calls:
            description = "must not stand beside tool_calls, which took its place"
            raise RecordError(f"{path}.function_call", "WRONG_VALUE", description)
        if not isinstance(call, Mapping):
            description = f"must be {{name, arguments}}, got {kind(call)}"
            raise RecordError(f"{path}.function_call", "WRONG_TYPE", description, call)
        name = required_text(call.get("name"), f"{path}.function_call.name")
        call_id = self._call_ids[name] = call_id_of(self._num_turns)
        return ({"id": call_id, "type": "function", "function": dict(call)},)

    def _function_result(self, value: Mapping[str, Any], path: str) -> Message:
        name = required_text(value.get("name"), f"{path}.name")
        if name not in self._call_ids:
            description = f"function must follow an assistant whose function_call names it, got {name!r}"
            raise RecordError(f"{path}.role", "WRONG_ROLE_ORDER", description, name)
        content = "" if value.get("content") is None else _content(value, "tool", path, may_be_empty=True)
        _weight(value.get("weight"), "function", f"{path}.weight")
        return Message(role="tool", content=content, name=name, tool_call_id=self._call_ids[name])


def _content(value: Mapping[str, Any], role: str, path: str, *, may_be_empty: bool) -> str:
    """Read the text of a turn: its content or, where that is null, its refusal."""
    content, refusal = value.get("content"), optional_text(value.get("refusal"), f"{path}.refusal")
    if refusal and role != "assistant":
        raise RecordError(f"{path}.refusal", "WRONG_ROLE", f"only an assistant refuses, not {role}", refusal)
    if refusal and content:
        description = "must be null where content stands: an answer is one or the other"
        raise RecordError(f"{path}.refusal", "WRONG_VALUE", description, refusal)
    path = f"{path}.content"
    if refusal:
        content = refusal
    elif isinstance(content, list):
        content = "".join(_part(part, f"{path}[{index}]") for index, part in enumerate(content))
    if role == "assistant" and not may_be_empty:
        return required_text(content, path)
    if content is None and role == "assistant":
        return ""
    if content and isinstance(content, str):
        return content
    return "" if may_be_empty and content == "" else required_text(content, path)


def _part(part: object, path: str) -> str:
    type_ = part.get("type", "text") if isinstance(part, Mapping) else None
    text = part.get(type_) if isinstance(part, Mapping) and type_ in ("text", "refusal") else None
    if isinstance(text, str):
        return text
    if isinstance(type_, str) and type_ not in ("text", "refusal"):
        description = f"must be a text part, got {type_!r}: models learn from text alone"
        raise RecordError(path, "NOT_TEXT", description, part)
    raise RecordError(path, "WRONG_TYPE", "must be {type: text, text: ...}", part)


def _weight(value: object, role: str, path: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or value not in (0, 1):
        raise RecordError(path, "WRONG_VALUE", f"must be 0 or 1, got {value!r}", value)
    if role == "assistant":
        return float(value)
    if value == 1:
        description = f"only assistant turns are learnt, not {role}: must be 0 or not be there, got 1"
        raise RecordError(path, "WRONG_ROLE", description, value)
    return None
