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
    if "chosen" in example:
        _set_pair(message, example)
    elif "messages" in example:
        message.conversation.messages.extend(map(_message, example["messages"]))
        message.conversation.tools_json = _json(example.get("tools"))
    else:
        message.prompt_completion.prompt = example["prompt"]
        message.prompt_completion.completion = example["completion"]
    if "label" in example:
        message.label = chat_pb2.LABEL_DESIRABLE if example["label"] else chat_pb2.LABEL_UNDESIRABLE
    return message


def _set_pair(message: dataset_pb2.Record, example: Mapping[str, Any]) -> None:
    if "messages" not in example:
        message.completion_pair.CopyFrom(chat_pb2.CompletionPair(**example))
        return
    pair = message.conversation_pair
    pair.messages.extend(map(_message, example["messages"]))
    pair.chosen.extend(map(_message, example["chosen"]))
    pair.rejected.extend(map(_message, example["rejected"]))
    pair.tools_json = _json(example.get("tools"))


def _message(message: Mapping[str, Any]) -> chat_pb2.ChatMessage:
    return chat_pb2.ChatMessage(
        role=message["role"],
        content=message.get("content") or "",
        name=message.get("name") or "",
        weight=message.get("weight"),
        tool_calls_json=_json(message.get("tool_calls")),
        tool_call_id=message.get("tool_call_id") or "",
    )


def _json(values: Any) -> str:
    return json.dumps(values, ensure_ascii=False) if values else ""
