"""Formats: recognised by their keys, read as they are, refused with path, value and what would be right."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

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
CALLING = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}}
NULL_KEYS = "weight name tool_calls tool_call_id refusal function_call audio annotations"
NULLS = dict.fromkeys(NULL_KEYS.split())


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        ({"messages": [USER, ASSISTANT]}, Format.OPENAI_CHAT),
        ({"prompt": "a", "completion": "b"}, Format.PROMPT_COMPLETION),
        ({"instruction": "a", "input": "", "output": "b"}, Format.ALPACA),
        ({"question": "a", "answer": "b"}, Format.QUESTION_ANSWER),
        ({"conversations": [], "system": "s", "tools": ""}, Format.SHAREGPT),
        ({"input": {}, "preferred_output": [], "non_preferred_output": []}, Format.PREFERENCE_OPENAI),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, Format.PREFERENCE),
        ({"chosen": [], "rejected": []}, Format.PREFERENCE),
        ({"conversations": [], "chosen": {}, "rejected": {}}, Format.SHAREGPT_PREFERENCE),
        ({"messages": [], "chosen": {}, "rejected": {}, "tools": "[]"}, Format.SHAREGPT_PREFERENCE),
        ({"prompt": "a", "completion": "b", "label": True}, Format.UNPAIRED),
        ({"messages": [], "label": True}, Format.SHAREGPT_UNPAIRED),
        ({"conversations": [], "label": True, "system": "s"}, Format.SHAREGPT_UNPAIRED),
    ],
)
def test_detect_goes_by_the_keys(value: object, wanted: Format) -> None:
    """What an answer is worth is never passed over: a labelled or a paired record is no supervised one."""
    assert detect([value]) is wanted
    assert detect([{"nothing": 1}, value, {"prompt": "a", "completion": "b"}]) is wanted


PLAIN = {"prompt": "a", "completion": "b"}


@pytest.mark.parametrize(
    ("value", "format_", "path", "said"),
    [
        ({**PLAIN, "label": True}, Format.PROMPT_COMPLETION, "label", "looks like UNPAIRED"),
        ({"messages": [], "label": True}, Format.OPENAI_CHAT, "label", "looks like SHAREGPT_UNPAIRED"),
        ({"messages": []}, Format.SHAREGPT_UNPAIRED, "label", "looks like OPENAI_CHAT"),
        ({"label": True}, Format.SHAREGPT_UNPAIRED, "conversations", "the record has label$"),
        (
            {**PLAIN, "chosen": "c", "rejected": "d"},
            Format.PROMPT_COMPLETION,
            "chosen",
            "looks like PREFERENCE",
        ),
        (
            PLAIN,
            Format.UNPAIRED,
            "label",
            "looks like PROMPT_COMPLETION: all records of a file have one format",
        ),
        ({"chosen": "a"}, Format.PREFERENCE, "rejected", "the record has chosen$"),
        ({"conversations": []}, Format.OPENAI_CHAT, "messages", "looks like SHAREGPT"),
    ],
)
def test_a_record_of_another_format_than_its_file_is_named_as_what_it_is(
    value: dict[str, Any], format_: Format, path: str, said: str
) -> None:
    with pytest.raises(RecordError, match=said) as caught:
        parse_record(value, format_)
    assert caught.value.path == path
    assert caught.value.reason in ("MISSING_FIELD", "UNKNOWN_FIELD")


def test_a_question_and_its_answer_become_a_conversation() -> None:
    messages = (Message(role="user", content="1+1?"), Message(role="assistant", content="2"))
    value = {"question": "1+1?", "answer": "2"}
    assert parse_record(value, Format.QUESTION_ANSWER) == ChatRecord(messages=messages)


def test_detect_names_the_keys_found_and_the_formats_known() -> None:
    with pytest.raises(UnknownFormatError, match=r"found \(answer, query\).*ALPACA: instruction, output"):
        detect([{"query": "a", "answer": "b"}])


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


def parsed(*messages: object, **others: object) -> ChatRecord:
    record = parse_record({"messages": list(messages), **others}, Format.OPENAI_CHAT)
    assert isinstance(record, ChatRecord)
    assert record_from_json(record_to_json(record)) == record
    return record


def test_null_stands_for_what_is_not_there() -> None:
    """As the SDK's own model_dump() writes messages."""
    plain = parsed(
        USER,
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c1", "content": ""},
        ASSISTANT,
    )
    calling = {**NULLS, "role": "assistant", "tool_calls": [CALL]}
    assert plain == parsed(
        {**NULLS, **USER},
        calling,
        {"role": "tool", "tool_call_id": "c1", "content": ""},
        {**NULLS, **ASSISTANT, "annotations": []},
        tools=None,
        functions=None,
        parallel_tool_calls=None,
        metadata=None,
    )


def test_a_refusal_is_the_text_of_the_answer() -> None:
    refused = parsed(USER, {"role": "assistant", "content": None, "refusal": "I cannot."})
    parts = parsed(USER, {"role": "assistant", "content": [{"type": "refusal", "refusal": "I cannot."}]})
    assert refused == parts == parsed(USER, {"role": "assistant", "content": "I cannot."})


@pytest.mark.parametrize(
    "roles",
    [
        "assistant",
        "system assistant",
        "developer assistant user assistant",
        "user user assistant",
        "user assistant assistant",
        "user system assistant",
        "system system user assistant",
        "user assistant system user assistant",
    ],
)
def test_every_order_that_ends_with_an_answer_is_taken(roles: str) -> None:
    messages = [{"role": role, "content": f"{role} {index}"} for index, role in enumerate(roles.split())]
    assert [message.role for message in parsed(*messages).messages] == roles.split()


def test_functions_become_tools() -> None:
    result = {"role": "function", "name": "f", "content": "42"}
    old = parsed(
        USER, CALLING, result, CALLING, {**result, "content": None}, ASSISTANT, functions=[{"name": "f"}]
    )
    calls = [{**CALL, "id": "call00001"}, {**CALL, "id": "call00003"}]
    new = parsed(
        USER,
        {"role": "assistant", "tool_calls": calls[:1]},
        {"role": "tool", "name": "f", "tool_call_id": "call00001", "content": "42"},
        {"role": "assistant", "tool_calls": calls[1:]},
        {"role": "tool", "name": "f", "tool_call_id": "call00003", "content": ""},
        ASSISTANT,
        tools=[{"type": "function", "function": {"name": "f"}}],
    )
    assert old == new


@pytest.mark.parametrize(
    ("others", "path"),
    [
        ({"tools": [{"type": "function"}], "functions": [{"name": "f"}]}, "functions"),
        ({"functions": "f"}, "functions"),
        ({"parallel_tool_calls": 1}, "parallel_tool_calls"),
    ],
)
def test_what_stands_beside_the_messages_is_checked(others: dict[str, object], path: str) -> None:
    with pytest.raises(RecordError) as caught:
        parsed(USER, ASSISTANT, **others)
    assert caught.value.path == path


def test_weights_of_turns_that_are_never_learnt_may_be_nought() -> None:
    assert parsed({**USER, "weight": 0}, ASSISTANT) == parsed(USER, ASSISTANT)


def validator_accepts(example: dict[str, Any]) -> bool:
    """The format checks of OpenAI's cookbook, "Data preparation and analysis for chat model fine-tuning"."""
    messages = example.get("messages")
    if not messages or not any(message.get("role") == "assistant" for message in messages):
        return False
    for message in messages:
        content, call = message.get("content"), message.get("function_call")
        known = message.keys() <= {"role", "content", "name", "function_call", "weight"}
        if not known or message.get("role") not in ("system", "user", "assistant", "function"):
            return False
        if not isinstance(content, str) or not (content or call):
            return False
    return True


@st.composite
def turns(draw: st.DrawFn) -> list[dict[str, Any]]:
    """A turn, or a call and its result: OpenAI's service refuses results of calls that were not made."""
    role = draw(st.sampled_from(["system", "user", "assistant", "call"]))
    text = st.sampled_from(["x", " ", "two\nlines", "ü"])
    turn: dict[str, Any] = {
        "role": role,
        "content": draw(text if role in ("system", "user") else st.just("x")),
    }
    if draw(st.booleans()):
        turn["name"] = "f"
    if role in ("assistant", "call") and draw(st.booleans()):
        turn["weight"] = draw(st.sampled_from([0, 1, None]))
    if role != "call":
        return [turn]
    calling = {**turn, "role": "assistant", "content": "", "function_call": {"name": "f", "arguments": "{}"}}
    return [calling, {"role": "function", "name": "f", "content": draw(text)}]


@given(st.lists(turns(), max_size=5))
def test_what_openai_s_validator_takes_is_taken(drawn: list[list[dict[str, Any]]]) -> None:
    """The last turn aside, which OpenAI's service wants to be the assistant's though the cookbook does not look."""
    messages = [turn for some in drawn for turn in some] + [ASSISTANT]
    assert validator_accepts({"messages": messages})
    assert len(parsed(*messages).messages) == len(messages)


def test_keys_that_nobody_knows_are_shown_short() -> None:
    value = {f"key{number:05}": 0 for number in range(80_000)} | {"\x1b[31m" + "x" * 999: 0}
    with pytest.raises(
        UnknownFormatError, match=r"x1b\[31mx+…', key00000, .*key00018, and 79981 more\)"
    ) as caught:
        detect([value])
    assert len(str(caught.value)) < 1000
    with pytest.raises(RecordError, match=r"and 79981 more$"):
        parse_record(value, Format.ALPACA)


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
        ([USER, ASSISTANT, USER], "messages[2].role", "WRONG_ROLE_ORDER", "last answer teaches nothing"),
        (
            [USER, ASSISTANT, {"role": "system", "content": "s"}],
            "messages[2].role",
            "WRONG_ROLE_ORDER",
            "last",
        ),
        (
            [USER, CALLING, {"role": "function", "name": "g", "content": "1"}, ASSISTANT],
            "messages[2].role",
            "WRONG_ROLE_ORDER",
            "function_call names it, got 'g'",
        ),
        (
            [USER, {**CALLING, "role": "user"}, ASSISTANT],
            "messages[1].function_call",
            "WRONG_ROLE",
            "not user",
        ),
        ([USER, {**CALLING, "tool_calls": [CALL]}], "messages[1].function_call", "WRONG_VALUE", "tool_calls"),
        ([USER, {**CALLING, "function_call": "auto"}], "messages[1].function_call", "WRONG_TYPE", "got text"),
        (
            [USER, {"role": "assistant", "content": "a", "refusal": "no"}],
            "messages[1].refusal",
            "WRONG_VALUE",
            "one or the other",
        ),
        ([{**USER, "refusal": "no"}, ASSISTANT], "messages[0].refusal", "WRONG_ROLE", "not user"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, ASSISTANT],
            "messages[0].content[0]",
            "NOT_TEXT",
            "got 'image_url': models learn from text alone",
        ),
        ([USER, {**ASSISTANT, "audio": {"id": "x"}}], "messages[1].audio", "NOT_TEXT", "must be null"),
        (
            [{"role": "system", "content": ""}, ASSISTANT],
            "messages[0].content",
            "EMPTY_FIELD",
            "not be empty",
        ),
        (
            [USER, {"role": "assistant", "content": None, "refusal": None}],
            "messages[1].content",
            "MISSING_FIELD",
            "got null",
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
        ({"question": "a", "answer": " "}, Format.QUESTION_ANSWER, "answer", "EMPTY_FIELD"),
        ({"question": ["a"], "answer": "b"}, Format.QUESTION_ANSWER, "question", "WRONG_TYPE"),
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
