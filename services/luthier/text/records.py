"""Records: what a line of any format becomes, and the id that its content gives it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn. `weight` 0 or 1 says whether an assistant turn is learnt, None that nothing was said.

    `tool_calls` are an assistant's calls as OpenAI writes them; `tool_call_id` names the call that a tool answers.
    """

    role: str
    content: str
    weight: float | None = None
    name: str | None = None
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    tool_call_id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRecord:
    """A conversation, and the tools that the assistant may call as OpenAI writes them.

    `label` says whether its last answer is desirable, None that nothing was said.
    """

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    label: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionRecord:
    """Plain text and its continuation.

    `label` says whether the continuation is desirable, None that nothing was said.
    """

    prompt: str
    completion: str
    label: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatPair:
    """A conversation and two ways to go on with it, the preferred one first.

    `messages` ask, and are shared. Each side has at least one turn, and begins and ends with an assistant's.
    """

    messages: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionPair:
    """Plain text and two continuations, the preferred one first."""

    prompt: str
    chosen: str
    rejected: str


SingleRecord = ChatRecord | CompletionRecord
"""A record with one answer."""
PairRecord = ChatPair | CompletionPair
"""A record with two answers."""
Record = SingleRecord | PairRecord

_COMPACT = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))
_SORTED = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), sort_keys=True)
_MESSAGES = ("messages", "chosen", "rejected")
SYSTEM_ROLES = ("system", "developer")
"""Roles of turns that instruct, and ask nothing."""
_NEVER_ASK = (*SYSTEM_ROLES, "assistant")


def message_to_object(message: Message) -> dict[str, Any]:
    """Return a message as JSON values, what is not set left out."""
    values: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.weight is not None:
        values["weight"] = message.weight
    if message.name is not None:
        values["name"] = message.name
    if message.tool_calls:
        values["tool_calls"] = [dict(call) for call in message.tool_calls]
    if message.tool_call_id is not None:
        values["tool_call_id"] = message.tool_call_id
    return values


def record_to_json(record: Record) -> str:
    """Return the JSON of a record, the keys of tools and calls in their own order: templates write them so."""
    values: dict[str, Any]
    match record:
        case ChatRecord():
            values = {"messages": _turns(record.messages)}
        case CompletionRecord():
            values = {"completion": record.completion, "prompt": record.prompt}
        case ChatPair():
            values = {
                "chosen": _turns(record.chosen),
                "messages": _turns(record.messages),
                "rejected": _turns(record.rejected),
            }
        case CompletionPair():
            values = {"chosen": record.chosen, "prompt": record.prompt, "rejected": record.rejected}
    if isinstance(record, ChatRecord | ChatPair) and record.tools:
        values["tools"] = [dict(tool) for tool in record.tools]
    if isinstance(record, ChatRecord | CompletionRecord) and record.label is not None:
        values["label"] = record.label
    return _COMPACT.encode(dict(sorted(values.items())))


def record_from_json(text: str) -> Record:
    """Read what `record_to_json` wrote."""
    values = json.loads(text)
    if "messages" not in values:
        return CompletionPair(**values) if "chosen" in values else CompletionRecord(**values)
    values.update({key: tuple(map(_message, values[key])) for key in _MESSAGES if key in values})
    values["tools"] = tuple(values.get("tools", ()))
    return ChatPair(**values) if "chosen" in values else ChatRecord(**values)


def record_id(record: Record, canonical: str | None = None) -> str:
    """Return the sha256 of a record's canonical JSON, in hex: records that differ in the order of keys are equal.

    `canonical` is what `record_to_json` gave, for those who have it.
    """
    text = record_to_json(record) if canonical is None else canonical
    return _digest(_SORTED.encode(json.loads(text)) if _has_objects(record) else text)


def prompt_id(record: Record) -> str | None:
    """Return the sha256 of what a record asks first, with its tools; None when it asks nothing.

    Of a conversation these are the turns before its first answer: the first assistant's turn after one that is neither
    an assistant's nor a system turn. Whatever two conversations ask later, where they ask the same they begin the same.
    """
    if isinstance(record, CompletionRecord | CompletionPair):
        return _digest(_COMPACT.encode([record.prompt])) if record.prompt.strip() else None
    asked = _asked_first(record.messages)
    if not asked:
        return None
    turns = [(one.role, one.content, one.name, one.tool_calls, one.tool_call_id) for one in asked]
    return _digest(_SORTED.encode([turns, record.tools]))


def _asked_first(messages: Sequence[Message]) -> Sequence[Message]:
    asks = False
    for index, message in enumerate(messages):
        if message.role == "assistant" and asks:
            return messages[:index]
        asks = asks or message.role not in _NEVER_ASK
    return messages if asks else ()


def _has_objects(record: Record) -> bool:
    """Return whether a record has objects whose keys may stand in any order."""
    if isinstance(record, CompletionRecord | CompletionPair):
        return False
    turns = (
        record.messages
        if isinstance(record, ChatRecord)
        else (*record.messages, *record.chosen, *record.rejected)
    )
    return bool(record.tools) or any(turn.tool_calls for turn in turns)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _turns(messages: Sequence[Message]) -> list[dict[str, Any]]:
    return [dict(sorted(message_to_object(message).items())) for message in messages]


def _message(values: Mapping[str, Any]) -> Message:
    return Message(**{**values, "tool_calls": tuple(values.get("tool_calls", ()))})
