"""ShareGPT's conversations: read as LLaMA-Factory reads them, refused by path, value and what would be right."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.text.formats import Format, RecordError, parse_record
from luthier.text.records import ChatPair, ChatRecord, Message, Record, record_from_json, record_to_json

HUMAN, GPT = {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}
CALL = {"name": "f", "arguments": {"x": "ü"}}
CALLING = {"from": "function_call", "value": json.dumps(CALL)}
RESULT = {"from": "observation", "value": "42"}
USER, ASSISTANT = Message(role="user", content="q"), Message(role="assistant", content="a")
BARE = {"name": "f", "description": "d", "parameters": {"type": "object"}}
TOOL = {"type": "function", "function": BARE}


def read(value: dict[str, Any], format_: Format) -> Record:
    record = parse_record(value, format_)
    assert record_from_json(record_to_json(record)) == record
    return record


def chat(*turns: object, **others: object) -> ChatRecord:
    record = read({"conversations": list(turns), **others}, Format.SHAREGPT)
    assert isinstance(record, ChatRecord)
    return record


def test_a_conversation_becomes_a_chat() -> None:
    system = {"from": "system", "value": "s"}
    record = chat(system, HUMAN, GPT, HUMAN, {"from": "gpt", "value": "b"})
    roles = [(one.role, one.content) for one in record.messages]
    assert roles == [("system", "s"), ("user", "q"), ("assistant", "a"), ("user", "q"), ("assistant", "b")]
    assert record == chat(HUMAN, GPT, HUMAN, {"from": "gpt", "value": "b"}, system="s", id="identity_0")
    assert chat(HUMAN, GPT, system="", tools="") == ChatRecord(messages=(USER, ASSISTANT))
    assert chat(HUMAN, GPT, system=None, tools=None) == ChatRecord(messages=(USER, ASSISTANT))


def test_a_conversation_of_roles_is_read_as_openai_writes_it() -> None:
    by_role = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert chat(*by_role) == ChatRecord(messages=(USER, ASSISTANT))


def test_calls_become_openai_s_and_are_answered_by_their_observations() -> None:
    record = chat(HUMAN, GPT, HUMAN, CALLING, RESULT, GPT, tools=json.dumps([BARE]))
    calling, result = record.messages[3:5]
    function = {"name": "f", "arguments": '{"x": "ü"}'}
    assert calling == Message(
        role="assistant",
        content="",
        tool_calls=({"id": "call00003", "type": "function", "function": function},),
    )
    assert result == Message(role="tool", content="42", name="f", tool_call_id="call00003")
    assert record.tools == (TOOL,)


def test_the_same_conversation_is_one_record_in_openai_s_shape() -> None:
    call = {"name": "f", "arguments": '{"x": "ü"}'}
    openai = {
        "messages": [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": None, "function_call": call},
            {"role": "function", "name": "f", "content": "42"},
            {"role": "assistant", "content": "a"},
        ],
        "functions": [BARE],
    }
    assert parse_record(openai, Format.OPENAI_CHAT) == chat(HUMAN, CALLING, RESULT, GPT, tools=[BARE])


def test_several_calls_of_a_turn_are_answered_one_by_one_in_their_order() -> None:
    calls = {"from": "function_call", "value": json.dumps([CALL, {"name": "g", "arguments": '{"y": 1}'}])}
    record = chat(HUMAN, calls, RESULT, {"from": "observation", "value": ""}, GPT)
    made = record.messages[1].tool_calls
    assert [call["function"] for call in made] == [
        {"name": "f", "arguments": '{"x": "ü"}'},
        {"name": "g", "arguments": '{"y": 1}'},
    ]
    ids = [call["id"] for call in made]
    assert [(one.name, one.tool_call_id, one.content) for one in record.messages[2:4]] == [
        ("f", ids[0], "42"),
        ("g", ids[1], ""),
    ]
    assert len(set(ids)) == 2
    assert all(len(one) == 9 and one.isalnum() for one in ids)


@pytest.mark.parametrize("tools", [[BARE], [TOOL], json.dumps([BARE]), f" {json.dumps([TOOL])}\n"])
def test_tools_are_a_list_or_its_json_text_bare_or_as_openai_writes_them(tools: object) -> None:
    assert chat(HUMAN, GPT, tools=tools).tools == (TOOL,)


@pytest.mark.parametrize("key", ["conversations", "messages"])
def test_a_pair_is_a_conversation_and_two_turns(key: str) -> None:
    value = {key: [HUMAN], "chosen": GPT, "rejected": {"from": "gpt", "value": "b"}, "system": "s"}
    assert read(value, Format.SHAREGPT_PREFERENCE) == ChatPair(
        messages=(Message(role="system", content="s"), USER),
        chosen=(ASSISTANT,),
        rejected=(Message(role="assistant", content="b"),),
    )


def test_a_pair_may_be_of_roles_and_its_sides_of_calls() -> None:
    by_role = {
        "messages": [{"role": "user", "content": "q"}],
        "chosen": {"role": "assistant", "content": "a"},
        "rejected": {"role": "assistant", "content": "a"},
    }
    equal = ChatPair(messages=(USER,), chosen=(ASSISTANT,), rejected=(ASSISTANT,))
    assert read(by_role, Format.SHAREGPT_PREFERENCE) == equal
    calling = {"conversations": [HUMAN, GPT, HUMAN], "chosen": CALLING, "rejected": GPT, "tools": [BARE]}
    pair = read(calling, Format.SHAREGPT_PREFERENCE)
    assert isinstance(pair, ChatPair)
    assert pair.chosen[0].tool_calls[0]["id"] == "call00003"
    assert pair.tools == (TOOL,)


@pytest.mark.parametrize("label", [True, False])
@pytest.mark.parametrize(
    "turns",
    [
        {"conversations": [HUMAN, GPT]},
        {"messages": [HUMAN, GPT]},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 1}]},
    ],
)
def test_a_label_is_of_the_last_answer(turns: dict[str, Any], label: bool) -> None:
    wanted = ChatRecord(messages=(USER, ASSISTANT), label=label)
    assert read({**turns, "label": label}, Format.SHAREGPT_UNPAIRED) == wanted


ROLES = st.lists(st.sampled_from(["human", "gpt", "system", "call"]), max_size=8)


@given(ROLES)
def test_whatever_order_ends_with_an_answer_is_taken_turn_by_turn(speakers: list[str]) -> None:
    turns = [
        turn
        for speaker in speakers
        for turn in ([CALLING, RESULT] if speaker == "call" else [{"from": speaker, "value": "x"}])
    ]
    record = chat(*turns, GPT)
    assert [one.content for one in record.messages] == [
        "" if turn["from"] == "function_call" else turn["value"] for turn in [*turns, GPT]
    ]
    calls = [call["id"] for one in record.messages for call in one.tool_calls]
    results = [one.tool_call_id for one in record.messages if one.role == "tool"]
    assert calls == results
    assert len(set(calls)) == len(calls)


def turn(value: object, speaker: object = "function_call") -> dict[str, Any]:
    return {"from": speaker, "value": value}


@pytest.mark.parametrize(
    ("turns", "path", "reason", "said"),
    [
        ([], "conversations", "WRONG_TYPE", "at least one message"),
        ("x", "conversations", "WRONG_TYPE", "must be a list"),
        ([3], "conversations[0]", "WRONG_TYPE", "JSON object, got a number"),
        ([HUMAN], "conversations[0].from", "WRONG_ROLE_ORDER", "last turn must be assistant, got user"),
        ([HUMAN, turn("a", "robot")], "conversations[1].from", "UNKNOWN_ROLE", "human, gpt, .*got 'robot'"),
        ([HUMAN, {"value": "a"}], "conversations[1].from", "MISSING_FIELD", "got None"),
        ([HUMAN, turn("a", ["gpt"])], "conversations[1].from", "UNKNOWN_ROLE", r"got \['gpt'\]"),
        ([HUMAN, turn(" ", "gpt")], "conversations[1].value", "EMPTY_FIELD", "not be empty"),
        ([HUMAN, {"from": "gpt"}], "conversations[1].value", "MISSING_FIELD", "got null"),
        ([HUMAN, turn(3, "gpt")], "conversations[1].value", "WRONG_TYPE", "got a number"),
        ([HUMAN, {**GPT, "score": 1}], "conversations[1].score", "UNKNOWN_FIELD", "from, value"),
        ([HUMAN, RESULT, GPT], "conversations[1].from", "WRONG_ROLE_ORDER", "follow a function_call"),
        (
            [HUMAN, CALLING, RESULT, RESULT, GPT],
            "conversations[3].from",
            "WRONG_ROLE_ORDER",
            "follow a function_call",
        ),
        (
            [HUMAN, turn(json.dumps([CALL, CALL])), RESULT, GPT],
            "conversations[3].from",
            "WRONG_ROLE_ORDER",
            "each of the 2 calls before it in their order, got gpt after 1",
        ),
        ([HUMAN, turn("f(x)")], "conversations[1].value", "INVALID_JSON", "must be JSON: Expecting value"),
        ([HUMAN, turn("{} {}")], "conversations[1].value", "INVALID_JSON", "Extra data"),
        ([HUMAN, turn('{"a": NaN}')], "conversations[1].value", "INVALID_JSON", "NaN is no JSON number"),
        ([HUMAN, turn("[" * 200 + "]" * 200)], "conversations[1].value", "INVALID_JSON", "100 deep"),
        ([HUMAN, turn("3")], "conversations[1].value", "WRONG_TYPE", "a call, or a list of calls.*a number"),
        ([HUMAN, turn("[]")], "conversations[1].value", "WRONG_TYPE", "a list of calls"),
        ([HUMAN, turn("[1]")], "conversations[1].value[0]", "WRONG_TYPE", "got a number"),
        ([HUMAN, turn('{"arguments": {}}')], "conversations[1].value.name", "MISSING_FIELD", "got null"),
        ([HUMAN, turn('{"name": "f"}')], "conversations[1].value.arguments", "MISSING_FIELD", "got null"),
        (
            [HUMAN, turn('{"name": "f", "arguments": 3}')],
            "conversations[1].value.arguments",
            "WRONG_TYPE",
            "an object or its JSON text, got a number",
        ),
        (
            [HUMAN, turn('[{"name": "f", "arguments": {}, "id": 1}]')],
            "conversations[1].value[0].id",
            "UNKNOWN_FIELD",
            "name, arguments",
        ),
        ([{"role": "user", "content": "q"}, GPT], "conversations[1].from", "UNKNOWN_FIELD", "got 'from'"),
        ([HUMAN, {"role": "assistant", "content": "a"}], "conversations[1].role", "UNKNOWN_FIELD", "'role'"),
    ],
)
def test_a_bad_conversation_is_refused_where_it_is_wrong(
    turns: Any, path: str, reason: str, said: str
) -> None:
    with pytest.raises(RecordError, match=said) as caught:
        parse_record({"conversations": turns}, Format.SHAREGPT)
    assert (caught.value.path, caught.value.reason) == (path, reason)


PAIR = {"conversations": [HUMAN], "chosen": GPT, "rejected": GPT}
LABELLED = {"conversations": [HUMAN, GPT], "label": True}


@pytest.mark.parametrize(
    ("value", "format_", "path", "reason"),
    [
        ({"conversations": [HUMAN, GPT], "tools": "no"}, Format.SHAREGPT, "tools", "INVALID_JSON"),
        ({"conversations": [HUMAN, GPT], "tools": '{"name": "f"}'}, Format.SHAREGPT, "tools", "WRONG_TYPE"),
        ({"conversations": [HUMAN, GPT], "tools": "[{}]"}, Format.SHAREGPT, "tools[0].name", "MISSING_FIELD"),
        ({"conversations": [HUMAN, GPT], "system": 3}, Format.SHAREGPT, "system", "WRONG_TYPE"),
        ({"conversations": [HUMAN, GPT], "system": " "}, Format.SHAREGPT, "system", "EMPTY_FIELD"),
        (
            {"conversations": [turn("s", "system"), HUMAN, GPT], "system": "t"},
            Format.SHAREGPT,
            "system",
            "WRONG_VALUE",
        ),
        ({"conversations": [HUMAN, GPT], "images": []}, Format.SHAREGPT, "images", "UNKNOWN_FIELD"),
        ({**PAIR, "messages": [HUMAN]}, Format.SHAREGPT_PREFERENCE, "messages", "WRONG_VALUE"),
        ({**PAIR, "chosen": [GPT]}, Format.SHAREGPT_PREFERENCE, "chosen", "WRONG_TYPE"),
        ({**PAIR, "rejected": "b"}, Format.SHAREGPT_PREFERENCE, "rejected", "WRONG_TYPE"),
        ({**PAIR, "rejected": turn("", "gpt")}, Format.SHAREGPT_PREFERENCE, "rejected.value", "EMPTY_FIELD"),
        ({**PAIR, "chosen": HUMAN}, Format.SHAREGPT_PREFERENCE, "chosen.from", "WRONG_ROLE_ORDER"),
        (
            {**PAIR, "conversations": [HUMAN, GPT]},
            Format.SHAREGPT_PREFERENCE,
            "conversations[1].from",
            "WRONG_ROLE_ORDER",
        ),
        (
            {**PAIR, "conversations": [HUMAN, turn(json.dumps([CALL, CALL])), RESULT]},
            Format.SHAREGPT_PREFERENCE,
            "chosen.from",
            "WRONG_ROLE_ORDER",
        ),
        ({**PAIR, "prompt": "q"}, Format.SHAREGPT_PREFERENCE, "prompt", "UNKNOWN_FIELD"),
        ({**LABELLED, "label": 1}, Format.SHAREGPT_UNPAIRED, "label", "WRONG_TYPE"),
        ({**LABELLED, "label": "true"}, Format.SHAREGPT_UNPAIRED, "label", "WRONG_TYPE"),
        ({**LABELLED, "label": None}, Format.SHAREGPT_UNPAIRED, "label", "MISSING_FIELD"),
        (
            {**LABELLED, "conversations": [HUMAN]},
            Format.SHAREGPT_UNPAIRED,
            "conversations[0].from",
            "WRONG_ROLE_ORDER",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "q"},
                    {"role": "assistant", "content": "a", "weight": 0},
                ],
                "label": True,
            },
            Format.SHAREGPT_UNPAIRED,
            "messages[1].weight",
            "WRONG_VALUE",
        ),
    ],
)
def test_a_bad_record_names_path_and_reason(
    value: dict[str, Any], format_: Format, path: str, reason: str
) -> None:
    with pytest.raises(RecordError) as caught:
        parse_record(value, format_)
    assert (caught.value.path, caught.value.reason) == (path, reason)
