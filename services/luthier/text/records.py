"""Records: what a line of any format becomes, and the id that its content gives it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
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
    """A conversation, and the tools that the assistant may call as OpenAI writes them."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionRecord:
    """Plain text and its continuation."""

    prompt: str
    completion: str


Record = ChatRecord | CompletionRecord


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
    if isinstance(record, ChatRecord):
        values = {
            "messages": [dict(sorted(message_to_object(message).items())) for message in record.messages]
        }
        if record.tools:
            values["tools"] = [dict(tool) for tool in record.tools]
    else:
        values = {"completion": record.completion, "prompt": record.prompt}
    return json.dumps(values, ensure_ascii=False, separators=(",", ":"))


def record_from_json(text: str) -> Record:
    """Read what `record_to_json` wrote."""
    values = json.loads(text)
    if "messages" not in values:
        return CompletionRecord(prompt=values["prompt"], completion=values["completion"])
    messages = tuple(
        Message(**{**message, "tool_calls": tuple(message.get("tool_calls", ()))})
        for message in values["messages"]
    )
    return ChatRecord(messages=messages, tools=tuple(values.get("tools", ())))


def record_id(record: Record) -> str:
    """Return the sha256 of a record's canonical JSON, in hex: records that differ in the order of keys are equal."""
    canonical = record_to_json(record)
    if isinstance(record, ChatRecord) and (record.tools or any(one.tool_calls for one in record.messages)):
        canonical = json.dumps(
            json.loads(canonical), ensure_ascii=False, sort_keys=True, separators=(",", ":")
        )
    return hashlib.sha256(canonical.encode()).hexdigest()
