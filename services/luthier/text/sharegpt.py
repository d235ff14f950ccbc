"""ShareGPT's conversations as LLaMA-Factory reads them, with pairs and labels, made the turns of chat records.

A turn is `from` and `value`, or `role` and `content` as OpenAI writes it: all turns of a record are one or the other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from luthier.text.conversations import (
    Turn,
    TurnReader,
    call_id_of,
    check_results,
    labelled,
    messages_of,
    pair_of,
    require_answer,
    turn_values,
)
from luthier.text.fields import RecordError, kind, optional_text, required_text
from luthier.text.openai_chat import ChatReader
from luthier.text.records import ChatPair, ChatRecord, Message
from luthier.text.tools import json_value, read_tools

_ROLES = {
    "system": "system",
    "human": "user",
    "gpt": "assistant",
    "function_call": "assistant",
    "observation": "tool",
}
_CALL_KEYS = ("name", "arguments")


def parse_sharegpt(value: Mapping[str, Any]) -> ChatRecord:
    """Read a record with `conversations`, most often `system` and `tools` too; `id` is read over.

    Raises:
        RecordError: the first thing that is wrong with it.
    """
    turns, _ = _conversation(value)
    require_answer(turns)
    return ChatRecord(messages=messages_of(turns), tools=read_tools(value.get("tools"), "tools"))


def parse_sharegpt_pair(value: Mapping[str, Any]) -> ChatPair:
    """Read a record with a conversation that asks, and one turn each as `chosen` and `rejected`.

    Raises:
        RecordError: the first thing that is wrong with it.
    """
    asking, reader = _conversation(value)
    chosen, rejected = (_side(reader, value[key], key) for key in ("chosen", "rejected"))
    return pair_of(asking, chosen, rejected, read_tools(value.get("tools"), "tools"))


def parse_sharegpt_label(value: Mapping[str, Any]) -> ChatRecord:
    """Read a record with a conversation, and a `label` that is true where its last turn is desirable.

    Raises:
        RecordError: the first thing that is wrong with it.
    """
    turns, _ = _conversation(value)
    return labelled(turns, value["label"], read_tools(value.get("tools"), "tools"))


def _conversation(value: Mapping[str, Any]) -> tuple[Sequence[Turn], TurnReader]:
    """Return the turns of a record, its system prompt first, and what can read those that follow."""
    if "conversations" in value and "messages" in value:
        raise RecordError("messages", "WRONG_VALUE", "must not stand beside conversations: a record has one")
    key = "conversations" if "conversations" in value else "messages"
    first = turn_values(value[key], key)[0]
    by_role = isinstance(first, Mapping) and "role" in first and "from" not in first
    reader: TurnReader = ChatReader() if by_role else _ShareGptReader()
    turns = reader.read(value[key], key)
    check_results(turns)
    system = optional_text(value.get("system"), "system")
    if not system:
        return turns, reader
    if turns[0].role == "system":
        description = "must not stand beside a system turn that begins the conversation"
        raise RecordError("system", "WRONG_VALUE", description, system)
    message = Message(role="system", content=required_text(system, "system"))
    return (Turn(message=message, role_path="system"), *turns), reader


def _side(reader: TurnReader, value: object, key: str) -> Sequence[Turn]:
    """Read a turn that stands alone, so that its path has no index."""
    if not isinstance(value, Mapping):
        raise RecordError(key, "WRONG_TYPE", f"must be one turn, an object, got {kind(value)}", value)
    return (reader.fork().read_one(value, key),)


class _ShareGptReader:
    """Reads turns of `from` and `value`; knows which calls have no result yet."""

    def __init__(self) -> None:
        self._calls: Sequence[Mapping[str, Any]] = ()
        self._num_results = 0
        self._num_turns = 0

    def fork(self) -> _ShareGptReader:
        """Return a reader of what follows the turns read so far; this one stays as it is."""
        made = _ShareGptReader()
        made._calls, made._num_results, made._num_turns = self._calls, self._num_results, self._num_turns
        return made

    def read(self, values: object, path: str) -> tuple[Turn, ...]:
        """Return the turns of a list with at least one. Raises RecordError."""
        found = turn_values(values, path)
        return tuple(self.read_one(value, f"{path}[{index}]") for index, value in enumerate(found))

    def read_one(self, value: object, path: str) -> Turn:
        """Return one turn, which stands at a path by itself. Raises RecordError."""
        if not isinstance(value, Mapping):
            raise RecordError(path, "WRONG_TYPE", f"must be a JSON object, got {kind(value)}", value)
        for key in value:
            if key not in ("from", "value"):
                description = f"must be one of from, value, got {key!r}"
                raise RecordError(f"{path}.{key}", "UNKNOWN_FIELD", description, value[key])
        speaker = value.get("from")
        if not isinstance(speaker, str) or speaker not in _ROLES:
            reason = "MISSING_FIELD" if speaker is None else "UNKNOWN_ROLE"
            description = f"must be one of {', '.join(_ROLES)}, got {speaker!r}"
            raise RecordError(f"{path}.from", reason, description, speaker)
        message = self._message(speaker, value.get("value"), path)
        self._num_turns += 1
        return Turn(message=message, role_path=f"{path}.from")

    def _message(self, speaker: str, value: object, path: str) -> Message:
        if speaker == "observation":
            return self._result(value, path)
        if 0 < self._num_results < len(self._calls):
            description = (
                f"must be an observation, one for each of the {len(self._calls)} calls before it in their order, "
                f"got {speaker} after {self._num_results}"
            )
            raise RecordError(f"{path}.from", "WRONG_ROLE_ORDER", description, speaker)
        self._calls, self._num_results = (), 0
        text = required_text(value, f"{path}.value")
        if speaker != "function_call":
            return Message(role=_ROLES[speaker], content=text)
        self._calls = _calls(text, f"{path}.value", self._num_turns)
        return Message(role="assistant", content="", tool_calls=tuple(self._calls))

    def _result(self, value: object, path: str) -> Message:
        if self._num_results == len(self._calls):
            description = "observation must follow a function_call, as the result of one of its calls"
            raise RecordError(f"{path}.from", "WRONG_ROLE_ORDER", description, "observation")
        text = "" if value == "" else required_text(value, f"{path}.value")
        call = self._calls[self._num_results]
        self._num_results += 1
        return Message(role="tool", content=text, name=call["function"]["name"], tool_call_id=call["id"])


def _calls(text: str, path: str, turn: int) -> Sequence[Mapping[str, Any]]:
    """Return the calls that a turn's JSON text holds: one, or a list of them."""
    value = json_value(text, path)
    if isinstance(value, Mapping):
        return [_call(value, path, call_id_of(turn))]
    if not isinstance(value, list) or not value:
        description = (
            f"must be a call, or a list of calls, as JSON text: {{name, arguments}}, got {kind(value)}"
        )
        raise RecordError(path, "WRONG_TYPE", description, text)
    return [_call(one, f"{path}[{number}]", call_id_of(turn, number)) for number, one in enumerate(value)]


def _call(value: object, path: str, call_id: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise RecordError(path, "WRONG_TYPE", f"must be {{name, arguments}}, got {kind(value)}", value)
    for key in value:
        if key not in _CALL_KEYS:
            raise RecordError(
                f"{path}.{key}", "UNKNOWN_FIELD", f"must be one of name, arguments, got {key!r}"
            )
    name, arguments = required_text(value.get("name"), f"{path}.name"), value.get("arguments")
    if isinstance(arguments, Mapping):
        arguments = json.dumps(arguments, ensure_ascii=False)
    if not isinstance(arguments, str):
        reason = "MISSING_FIELD" if arguments is None else "WRONG_TYPE"
        description = f"must be an object or its JSON text, got {kind(arguments)}"
        raise RecordError(f"{path}.arguments", reason, description, arguments)
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
