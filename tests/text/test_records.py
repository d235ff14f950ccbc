"""Records: one canonical text for equal contents, read back whole."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.text.records import (
    ChatPair,
    ChatRecord,
    CompletionPair,
    CompletionRecord,
    Message,
    Record,
    prompt_id,
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


ASKING = (Message(role="system", content="s"), Message(role="user", content="q"))


def answer(text: str, **others: Any) -> tuple[Message, ...]:
    return (Message(role="assistant", content=text, **others),)


PAIR = ChatPair(
    messages=ASKING,
    chosen=(*answer("", tool_calls=(CALL,)), Message(role="tool", content="1"), *answer("yes")),
    rejected=answer("no"),
    tools=({"type": "function", "function": {"name": "f"}},),
)
PLAIN_PAIR = CompletionPair(prompt="a", chosen="b", rejected="c")


@pytest.mark.parametrize(
    "record",
    [
        PAIR,
        ChatPair(messages=ASKING, chosen=answer("yes"), rejected=answer("no")),
        PLAIN_PAIR,
        replace(CHAT, label=True),
        replace(CHAT, label=False),
        replace(COMPLETION, label=False),
    ],
)
def test_a_pair_and_a_label_come_back_from_their_json(record: Record) -> None:
    assert record_from_json(record_to_json(record)) == record


def test_the_json_of_pairs_and_labels_has_its_keys_in_order() -> None:
    assert record_to_json(PLAIN_PAIR) == '{"chosen":"b","prompt":"a","rejected":"c"}'
    assert record_to_json(replace(COMPLETION, label=False)) == '{"completion":"b","label":false,"prompt":"a"}'
    assert list(json.loads(record_to_json(PAIR))) == ["chosen", "messages", "rejected", "tools"]
    assert list(json.loads(record_to_json(replace(CHAT, label=True)))) == ["label", "messages", "tools"]


def test_the_sides_of_a_pair_and_the_label_are_part_of_the_id() -> None:
    turned = replace(PAIR, chosen=PAIR.rejected, rejected=PAIR.chosen)
    records: list[Record] = [PAIR, turned, CHAT, COMPLETION, PLAIN_PAIR]
    records += [replace(CHAT, label=True), replace(CHAT, label=False), replace(COMPLETION, label=True)]
    assert len({record_id(record) for record in records}) == len(records)
    backwards = {"function": {"arguments": "{}", "name": "f"}, "id": "1", "type": "function"}
    chosen = (*answer("", tool_calls=(backwards,)), *PAIR.chosen[1:])
    assert record_id(replace(PAIR, chosen=chosen)) == record_id(PAIR)


def chat(*turns: str, tools: tuple[dict[str, Any], ...] = (), weight: float | None = None) -> ChatRecord:
    """Turns as ROLE TEXT; assistant turns have the weight."""
    messages = []
    for turn in turns:
        role, _, text = turn.partition(" ")
        messages.append(Message(role=role, content=text, weight=weight if role == "assistant" else None))
    return ChatRecord(messages=tuple(messages), tools=tools)


FIRST = chat("system s", "user q", "assistant a")


@pytest.mark.parametrize(
    "record",
    [
        chat("system s", "user q", "assistant other"),
        chat("system s", "user q", "assistant a", weight=0.0),
        chat("system s", "user q", "assistant b", "user r", "assistant c"),
        replace(FIRST, label=False),
        ChatPair(messages=ASKING, chosen=answer("yes"), rejected=answer("no")),
        ChatPair(messages=FIRST.messages + ASKING[1:], chosen=answer("yes"), rejected=answer("no")),
    ],
)
def test_records_that_ask_the_same_first_have_one_prompt(record: Record) -> None:
    assert prompt_id(record) == prompt_id(FIRST) is not None


@pytest.mark.parametrize(
    "record",
    [
        chat("user q", "assistant a"),
        chat("system s", "user q2", "assistant a"),
        chat("system s", "assistant hello", "user q", "assistant a"),
        chat("system s", "user q", "assistant a", tools=({"type": "function"},)),
        CompletionRecord(prompt="q", completion="a"),
    ],
)
def test_records_that_ask_something_else_have_another_prompt(record: Record) -> None:
    assert None is not prompt_id(record) != prompt_id(FIRST)


def test_a_greeting_before_the_question_is_part_of_the_prompt() -> None:
    greeted = chat("assistant hello", "user q", "assistant a", "user r", "assistant b")
    assert prompt_id(greeted) == prompt_id(chat("assistant hello", "user q", "assistant c", weight=1.0))
    assert prompt_id(greeted) != prompt_id(chat("assistant hello", "user other", "assistant a"))


def test_plain_records_of_one_text_have_one_prompt_whatever_they_are() -> None:
    records: list[Record] = [COMPLETION, replace(COMPLETION, completion="c", label=True), PLAIN_PAIR]
    assert len({prompt_id(record) for record in records}) == 1
    assert prompt_id(replace(COMPLETION, prompt="z")) != prompt_id(COMPLETION)


def test_the_order_of_keys_does_not_change_the_prompt() -> None:
    turned = replace(CHAT, tools=({"function": {"name": "f"}, "type": "function"},))
    assert record_to_json(turned) != record_to_json(CHAT)
    assert prompt_id(turned) == prompt_id(CHAT)


@pytest.mark.parametrize(
    "record",
    [
        CompletionRecord(prompt="", completion="all of it"),
        CompletionRecord(prompt=" \n", completion="all of it"),
        CompletionPair(prompt="", chosen="a", rejected="b"),
        chat("assistant a"),
        chat("system s", "assistant a", "assistant b"),
    ],
)
def test_a_record_that_asks_nothing_has_no_prompt(record: Record) -> None:
    assert prompt_id(record) is None


TURNS = st.lists(
    st.builds(
        lambda role, content: Message(role=role, content=content),
        st.sampled_from(["system", "user", "assistant", "tool"]),
        st.sampled_from(["a", "b"]),
    ),
    max_size=6,
)


def prompts_of(messages: tuple[Message, ...]) -> set[tuple[Message, ...]]:
    """What stands before each assistant turn, where it asks something."""
    befores = [messages[:index] for index, one in enumerate(messages) if one.role == "assistant"]
    return {before for before in befores if any(one.role in ("user", "tool") for one in before)}


@given(TURNS, TURNS, TURNS)
def test_conversations_that_share_any_prompt_have_one_prompt_id(
    start: list[Message], one: list[Message], other: list[Message]
) -> None:
    """So records that ask the same at any turn are in one split."""
    first, second = ((*start, *rest, *answer("end")) for rest in (one, other))
    if prompts_of(first) & prompts_of(second):
        assert prompt_id(ChatRecord(messages=first)) == prompt_id(ChatRecord(messages=second)) is not None
