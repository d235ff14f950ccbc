"""Stored records as messages."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from luthier.data.splits import split_named
from luthier.v1 import chat_pb2, dataset_pb2


def stored_record(row: Mapping[str, Any]) -> dataset_pb2.Record:
    """Return a record as callers see it; `row` has the columns of a version's shards."""
    message = dataset_pb2.Record(
        row=row["row"],
        record_id=row["record_id"],
        split=split_named(row["split"]),
        filename=row["filename"],
        line=row["line"],
    )
    example = json.loads(row["record"])
    if "messages" in example:
        message.conversation.CopyFrom(_conversation(example))
    else:
        message.prompt_completion.prompt = example["prompt"]
        message.prompt_completion.completion = example["completion"]
    return message


def _conversation(example: Mapping[str, Any]) -> chat_pb2.Conversation:
    tools = example.get("tools")
    return chat_pb2.Conversation(
        messages=[_message(message) for message in example["messages"]],
        tools_json=json.dumps(tools, ensure_ascii=False) if tools else "",
    )


def _message(message: Mapping[str, Any]) -> chat_pb2.ChatMessage:
    calls = message.get("tool_calls")
    return chat_pb2.ChatMessage(
        role=message["role"],
        content=message.get("content") or "",
        name=message.get("name") or "",
        weight=message.get("weight"),
        tool_calls_json=json.dumps(calls, ensure_ascii=False) if calls else "",
        tool_call_id=message.get("tool_call_id") or "",
    )
