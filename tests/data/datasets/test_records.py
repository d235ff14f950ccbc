"""Stored records as callers see them, whatever their shape."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from luthier.data.datasets.records import stored_record
from luthier.text.records import (
    ChatPair,
    ChatRecord,
    CompletionPair,
    CompletionRecord,
    Message,
    Record,
    record_to_json,
)
from luthier.v1 import dataset_pb2
from luthier.v1.chat_pb2 import LABEL_DESIRABLE, LABEL_UNDESIRABLE, LABEL_UNSPECIFIED

CALL = {"id": "call00001", "type": "function", "function": {"name": "f", "arguments": "{}"}}
TOOL = {"type": "function", "function": {"name": "f"}}
USER = Message(role="user", content="q")
ASSISTANT = Message(role="assistant", content="a", weight=0.0)
CHAT = ChatRecord(messages=(USER, ASSISTANT), tools=(TOOL,))


def stored(record: Record) -> dataset_pb2.Record:
    return stored_record(
        {
            "row": 3,
            "record_id": "abc",
            "split": "TEST",
            "filename": "a.jsonl",
            "line": 7,
            "record": record_to_json(record),
        }
    )


def test_a_pair_of_conversations_has_its_prompt_its_tools_and_both_sides() -> None:
    calling = Message(role="assistant", content="", tool_calls=(CALL,))
    result = Message(role="tool", content="1", tool_call_id="call00001")
    record = ChatPair(
        messages=(USER,), chosen=(calling, result, ASSISTANT), rejected=(ASSISTANT,), tools=(TOOL,)
    )
    found = stored(record)
    assert found.WhichOneof("example") == "conversation_pair"
    pair = found.conversation_pair
    assert [one.content for one in pair.messages] == ["q"]
    assert [(one.role, one.content) for one in pair.chosen] == [
        ("assistant", ""),
        ("tool", "1"),
        ("assistant", "a"),
    ]
    assert json.loads(pair.chosen[0].tool_calls_json) == [CALL]
    assert pair.chosen[1].tool_call_id == "call00001"
    assert [one.role for one in pair.rejected] == ["assistant"]
    assert json.loads(pair.tools_json) == [TOOL]
    assert (found.row, found.split, found.line) == (3, dataset_pb2.SPLIT_TEST, 7)
    assert found.label == LABEL_UNSPECIFIED


def test_a_pair_of_plain_texts_has_its_prompt_and_both_sides() -> None:
    found = stored(CompletionPair(prompt="p", chosen="c", rejected="r"))
    assert found.WhichOneof("example") == "completion_pair"
    pair = found.completion_pair
    assert (pair.prompt, pair.chosen, pair.rejected) == ("p", "c", "r")


@pytest.mark.parametrize(
    ("label", "wanted"), [(None, LABEL_UNSPECIFIED), (True, LABEL_DESIRABLE), (False, LABEL_UNDESIRABLE)]
)
def test_a_label_stands_beside_the_example(label: bool | None, wanted: int) -> None:
    chat = stored(replace(CHAT, label=label))
    plain = stored(CompletionRecord(prompt="p", completion="c", label=label))
    assert chat.label == plain.label == wanted
    assert [one.role for one in chat.conversation.messages] == ["user", "assistant"]
    assert chat.conversation.messages[1].weight == 0.0
    assert json.loads(chat.conversation.tools_json) == [TOOL]
    assert (plain.prompt_completion.prompt, plain.prompt_completion.completion) == ("p", "c")
