"""Which given items are records that ask, and what is said of others."""

from __future__ import annotations

import json
from typing import Any

import pytest

from luthier.errors import Reason
from luthier.evaluation.worker.sample_values import asking_record
from luthier.grading.outcomes import GradingError
from luthier.text.records import (
    ChatPair,
    ChatRecord,
    CompletionPair,
    CompletionRecord,
    Message,
    Record,
    record_to_json,
)
from luthier.text.units import reference_record, with_text

USER, ANSWER, OTHER = (
    Message(role=role, content=content)
    for role, content in (("user", "?"), ("assistant", "a"), ("assistant", "b"))
)
CALL: dict[str, Any] = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
RECORDS: list[Record] = [
    CompletionRecord(prompt="ask ", completion="a"),
    CompletionPair(prompt="ask ", chosen="a", rejected="b"),
    ChatRecord(messages=(USER, ANSWER)),
    ChatRecord(messages=(USER, ANSWER, USER, OTHER), tools=({"type": "function"},)),
    ChatRecord(
        messages=(
            USER,
            Message(role="assistant", content="", tool_calls=(CALL,)),
            Message(role="tool", content="1", tool_call_id="1", name="f"),
            ANSWER,
        )
    ),
    ChatPair(messages=(USER,), chosen=(ANSWER,), rejected=(OTHER,)),
    ChatPair(messages=(USER,), chosen=(ANSWER, USER, ANSWER), rejected=(OTHER,)),
]


@pytest.mark.parametrize("record", RECORDS)
def test_a_record_of_a_version_asks_as_its_evaluation_does(record: Record) -> None:
    assert with_text(asking_record(record_to_json(record)), "x") == with_text(reference_record(record), "x")


@pytest.mark.parametrize(
    "item",
    [
        {"messages": [{"role": "user", "content": "?"}]},
        {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "a"}], "answer": 4},
    ],
)
def test_a_conversation_without_its_answer_and_fields_of_its_own_ask_too(item: dict[str, Any]) -> None:
    assert asking_record(json.dumps(item)) == ChatRecord(
        messages=(USER, Message(role="assistant", content=""))
    )


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("", "it must have messages, or a prompt that is a text, it has nothing"),
        ('{"answer": 4}', "it must have messages, or a prompt that is a text, it has answer"),
        ('{"prompt": 4}', "it has prompt"),
        ('{"messages": "?"}', "messages must be a list of objects"),
        ('{"messages": []}', "messages must have a turn that asks, they have none"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "messages must have a turn that asks"),
        ('{"messages": [{"role": "user", "content": 1}]}', r"messages\[0\].content must be a text"),
        ('{"messages": [{"content": "?"}]}', r"messages\[0\].role must be a text"),
        ('{"messages": [{"role": "user", "content": "?", "name": 1}]}', r"messages\[0\].name must be a text"),
        ('{"messages": [{"role": "user", "content": "?"}], "tools": [1]}', "tools must be a list of objects"),
        (
            '{"messages": [{"role": "user", "content": "?"}], "chosen": ["a"]}',
            "chosen must be a list of objects",
        ),
        ("[]", "the record must be a JSON object"),
        ("{", "must be JSON"),
    ],
)
def test_what_asks_nothing_is_an_error_with_what_would_be_right(item: str, message: str) -> None:
    with pytest.raises(GradingError, match=message) as caught:
        asking_record(item)
    assert caught.value.reason == Reason.GRADER_INPUT_INVALID
