"""Formats: recognised by their keys, read as they are, refused with path, value and what would be right."""

from __future__ import annotations

from typing import Any

import pytest

from luthier.text.formats import Format, RecordError, UnknownFormatError, detect, parse_record
from luthier.text.records import (
    ChatRecord,
    CompletionRecord,
    Message,
    record_from_json,
    record_id,
    record_to_json,
)

USER = {"role": "user", "content": "q"}
ASSISTANT = {"role": "assistant", "content": "a"}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        ({"messages": [USER, ASSISTANT]}, Format.OPENAI_CHAT),
        ({"prompt": "a", "completion": "b"}, Format.PROMPT_COMPLETION),
        ({"instruction": "a", "input": "", "output": "b"}, Format.ALPACA),
    ],
)
def test_detect_goes_by_the_keys(value: object, wanted: Format) -> None:
    assert detect([value]) is wanted


def test_detect_names_the_keys_found_and_the_formats_known() -> None:
    with pytest.raises(UnknownFormatError, match=r"found \(answer, question\).*ALPACA: instruction, output"):
        detect([{"question": "a", "answer": "b"}])


def test_openai_chat_is_taken_as_is() -> None:
    value = {
        "messages": [
            {"role": "system", "content": "s"},
            USER,
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "c1", "content": "42"},
            {
                "role": "assistant",
                "content": [{"type": "text", "text": "the "}, {"type": "text", "text": "end"}],
            },
            USER,
            {"role": "assistant", "content": "bye", "weight": 0},
        ],
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "parallel_tool_calls": False,
    }
    record = parse_record(value, Format.OPENAI_CHAT)
    assert isinstance(record, ChatRecord)
    assert [message.content for message in record.messages] == ["s", "q", "", "42", "the end", "q", "bye"]
    assert record.messages[2].tool_calls == (CALL,)
    assert record.messages[-1].weight == 0.0
    assert record_from_json(record_to_json(record)) == record


def test_alpaca_becomes_a_chat() -> None:
    value = {"instruction": "Add.", "input": "1 2", "output": "3", "system": "s", "history": [["q", "a"]]}
    roles = ("system", "user", "assistant", "user", "assistant")
    texts = ("s", "q", "a", "Add.\n\n1 2", "3")
    messages = tuple(Message(role=role, content=text) for role, text in zip(roles, texts, strict=True))
    assert parse_record(value, Format.ALPACA) == ChatRecord(messages=messages)


def test_alpaca_without_input_asks_the_instruction_alone() -> None:
    record = parse_record({"instruction": "Hi", "input": "", "output": "Ho"}, Format.ALPACA)
    assert isinstance(record, ChatRecord)
    assert record.messages[0].content == "Hi"


@pytest.mark.parametrize(
    ("messages", "path", "reason", "said"),
    [
        ([], "messages", "WRONG_TYPE", "at least one message"),
        ([USER], "messages[0].role", "WRONG_ROLE_ORDER", "the last turn must be assistant, got user"),
        ([ASSISTANT], "messages[0].role", "WRONG_ROLE_ORDER", "must follow user"),
        ([USER, USER, ASSISTANT], "messages[1].role", "WRONG_ROLE_ORDER", "followed by assistant, got user"),
        (
            [USER, ASSISTANT, {"role": "system", "content": "s"}],
            "messages[2].role",
            "WRONG_ROLE_ORDER",
            "first",
        ),
        (
            [USER, {"role": "tool", "content": "t"}, ASSISTANT],
            "messages[1].role",
            "WRONG_ROLE_ORDER",
            "calls it",
        ),
        ([{"role": "bot", "content": "x"}], "messages[0].role", "UNKNOWN_ROLE", "one of system, .*got 'bot'"),
        ([{"content": "x"}], "messages[0].role", "MISSING_FIELD", "got None"),
        ([USER, {"role": "assistant"}], "messages[1].content", "MISSING_FIELD", "must be text, got null"),
        ([USER, {"role": "assistant", "content": 3}], "messages[1].content", "WRONG_TYPE", "got a number"),
        ([USER, {"role": "assistant", "content": " "}], "messages[1].content", "EMPTY_FIELD", "not be empty"),
        ([USER, {**ASSISTANT, "weight": 0.5}], "messages[1].weight", "WRONG_VALUE", "0 or 1, got 0.5"),
        ([{**USER, "weight": 1}, ASSISTANT], "messages[0].weight", "WRONG_ROLE", "only assistant turns"),
        ([{**USER, "wait": 1}, ASSISTANT], "messages[0].wait", "UNKNOWN_FIELD", "got 'wait'"),
        ([{**USER, "tool_calls": [CALL]}, ASSISTANT], "messages[0].tool_calls", "WRONG_ROLE", "not user"),
        (["x"], "messages[0]", "WRONG_TYPE", "must be a JSON object, got text"),
        ("x", "messages", "WRONG_TYPE", "must be a list"),
    ],
)
def test_a_bad_chat_is_refused_where_it_is_wrong(messages: Any, path: str, reason: str, said: str) -> None:
    with pytest.raises(RecordError, match=said) as caught:
        parse_record({"messages": messages}, Format.OPENAI_CHAT)
    assert (caught.value.path, caught.value.reason) == (path, reason)


@pytest.mark.parametrize(
    ("value", "format_", "path", "reason"),
    [
        (["a"], Format.ALPACA, "", "WRONG_TYPE"),
        ({"prompt": "a"}, Format.PROMPT_COMPLETION, "completion", "MISSING_FIELD"),
        ({"prompt": "a", "completion": ""}, Format.PROMPT_COMPLETION, "completion", "EMPTY_FIELD"),
        ({"prompt": 1, "completion": "b"}, Format.PROMPT_COMPLETION, "prompt", "WRONG_TYPE"),
        ({"prompt": "a", "completion": "b", "x": 1}, Format.PROMPT_COMPLETION, "x", "UNKNOWN_FIELD"),
        ({"instruction": "a", "output": None}, Format.ALPACA, "output", "MISSING_FIELD"),
        ({"instruction": "a", "output": "b", "history": ["x"]}, Format.ALPACA, "history[0]", "WRONG_TYPE"),
        ({"instruction": "a", "output": "b", "history": 5}, Format.ALPACA, "history", "WRONG_TYPE"),
        ({"instruction": "a", "output": "b", "input": 0}, Format.ALPACA, "input", "WRONG_TYPE"),
        ({"instruction": "a", "output": "b", "system": []}, Format.ALPACA, "system", "WRONG_TYPE"),
    ],
)
def test_a_bad_record_names_path_and_reason(value: object, format_: Format, path: str, reason: str) -> None:
    with pytest.raises(RecordError) as caught:
        parse_record(value, format_)
    assert (caught.value.path, caught.value.reason) == (path, reason)


def test_the_offending_value_is_shown_short() -> None:
    with pytest.raises(RecordError) as caught:
        parse_record({"messages": [{"role": "x" * 5000, "content": "y"}]}, Format.OPENAI_CHAT)
    assert caught.value.value.startswith("'xxx")
    assert len(caught.value.value) == 200


def test_the_record_id_depends_on_the_content_alone() -> None:
    one = parse_record({"prompt": "a", "completion": "b"}, Format.PROMPT_COMPLETION)
    other = parse_record({"completion": "b", "prompt": "a"}, Format.PROMPT_COMPLETION)
    assert record_id(one) == record_id(other)
    assert record_id(one) != record_id(CompletionRecord(prompt="a", completion="c"))
