"""Records: one canonical text for equal contents, read back whole."""

from __future__ import annotations

import hashlib
import json

import pytest

from luthier.text.records import (
    ChatRecord,
    CompletionRecord,
    Message,
    Record,
    record_from_json,
    record_id,
    record_to_json,
)

CALL = {"type": "function", "id": "1", "function": {"name": "f", "arguments": "{}"}}
CHAT = ChatRecord(
    messages=(
        Message(role="user", content="ü", name="u"),
        Message(role="assistant", content="", tool_calls=(CALL,)),
        Message(role="tool", content="3", tool_call_id="1"),
        Message(role="assistant", content="x", weight=0.0),
    ),
    tools=({"type": "function", "function": {"name": "f"}},),
)
COMPLETION = CompletionRecord(prompt="a", completion="b")


@pytest.mark.parametrize("record", [CHAT, COMPLETION])
def test_a_record_comes_back_from_its_json(record: Record) -> None:
    assert record_from_json(record_to_json(record)) == record


def test_the_order_of_keys_does_not_change_the_id() -> None:
    turned = ChatRecord(messages=CHAT.messages, tools=({"function": {"name": "f"}, "type": "function"},))
    assert record_id(turned) == record_id(CHAT)


def test_tools_and_calls_keep_the_order_of_their_keys() -> None:
    tool = {"type": "function", "function": {"name": "f", "description": "d", "b": {"z": 1, "a": 2}}}
    call = {"type": "function", "id": "1", "function": {"name": "f", "arguments": {"z": 1, "a": 2}}}
    messages = (Message(role="user", content="q"), Message(role="assistant", content="", tool_calls=(call,)))
    read = record_from_json(record_to_json(ChatRecord(messages=messages, tools=(tool,))))
    assert isinstance(read, ChatRecord)
    assert json.dumps(read.tools) == json.dumps([tool])
    assert json.dumps(read.messages[1].tool_calls) == json.dumps([call])


def test_the_id_of_a_record_with_tools_is_as_it_always_was() -> None:
    assert record_id(CHAT) == "70c331a6c10a2cef72a2be4a7b4a0e2a2f3fbe46ae7cc51fd9abfb74e044e7dd"


def test_the_id_is_the_sha256_of_sorted_compact_json() -> None:
    assert record_to_json(COMPLETION) == '{"completion":"b","prompt":"a"}'
    assert record_id(COMPLETION) == hashlib.sha256(b'{"completion":"b","prompt":"a"}').hexdigest()


def test_what_is_learnt_is_part_of_the_id() -> None:
    first, second = (
        ChatRecord(messages=(Message(role="assistant", content="x", weight=weight),)) for weight in (0.0, 1.0)
    )
    assert record_id(first) != record_id(second)
