"""Preference pairs of OpenAI and TRL, and TRL's labelled answers: read as they are, never guessed."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.text.formats import Format, RecordError, parse_record
from luthier.text.records import (
    ChatPair,
    ChatRecord,
    CompletionPair,
    CompletionRecord,
    Message,
    Record,
    record_from_json,
    record_to_json,
)

SYSTEM = {"role": "system", "content": "s"}
USER = {"role": "user", "content": "q"}
GOOD, BAD = {"role": "assistant", "content": "good"}, {"role": "assistant", "content": "bad"}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "42"}
TOOL = {"type": "function", "function": {"name": "f"}}
ASKING = (Message(role="user", content="q"),)
CHOSEN, REJECTED = (Message(role="assistant", content="good"),), (Message(role="assistant", content="bad"),)
PAIR = ChatPair(messages=ASKING, chosen=CHOSEN, rejected=REJECTED)
OPENAI = {"input": {"messages": [USER]}, "preferred_output": [GOOD], "non_preferred_output": [BAD]}
EXPLICIT = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}
IMPLICIT = {"chosen": [USER, GOOD], "rejected": [USER, BAD]}
TEXT = {"prompt": "q: ", "chosen": "good", "rejected": "bad"}
LABEL = {"prompt": [USER], "completion": [GOOD], "label": False}


def read(value: dict[str, Any], format_: Format = Format.PREFERENCE) -> Record:
    record = parse_record(value, format_)
    assert record_from_json(record_to_json(record)) == record
    return record


def read_or_reason(value: dict[str, Any]) -> Record | str:
    try:
        return read(value)
    except RecordError as error:
        return error.reason


def test_openai_s_pair_is_taken_as_is() -> None:
    assert read(OPENAI, Format.PREFERENCE_OPENAI) == PAIR
    given_ = {"messages": [USER], "tools": [TOOL], "parallel_tool_calls": True}
    with_tools = read({**OPENAI, "input": given_}, Format.PREFERENCE_OPENAI)
    assert with_tools == ChatPair(messages=ASKING, chosen=CHOSEN, rejected=REJECTED, tools=(TOOL,))
    nothing = {"messages": [USER], "tools": None, "parallel_tool_calls": None}
    assert read({**OPENAI, "input": nothing}, Format.PREFERENCE_OPENAI) == PAIR


@pytest.mark.parametrize("value", [EXPLICIT, IMPLICIT, {**IMPLICIT, "prompt": None}])
def test_trl_s_pair_is_one_whether_its_prompt_is_said_or_not(value: dict[str, Any]) -> None:
    assert read(value) == PAIR


def test_sides_may_be_of_several_turns_and_use_tools() -> None:
    value = {"prompt": [SYSTEM, USER], "chosen": [CALLING, RESULT, GOOD], "rejected": [BAD], "tools": [TOOL]}
    pair = read(value)
    assert isinstance(pair, ChatPair)
    assert [one.role for one in pair.chosen] == ["assistant", "tool", "assistant"]
    assert pair.chosen[0].tool_calls == (CALL,)
    assert pair.tools == (TOOL,)
    whole = {
        "chosen": [SYSTEM, USER, CALLING, RESULT, GOOD],
        "rejected": [SYSTEM, USER, BAD],
        "tools": [TOOL],
    }
    assert read(whole) == pair


def test_an_implicit_prompt_holds_all_turns_in_common() -> None:
    begun = [USER, GOOD, USER]
    assert read({"chosen": [*begun, GOOD], "rejected": [*begun, BAD]}) == read(
        {"prompt": begun, "chosen": [GOOD], "rejected": [BAD]}
    )
    # A side keeps its last turn: of equal sides that one is the answer, of a side that goes on longer what goes on.
    equal = ChatPair(messages=ASKING, chosen=CHOSEN, rejected=CHOSEN)
    assert read({"chosen": [USER, GOOD], "rejected": [USER, GOOD]}) == equal
    longer = read({"chosen": [USER, GOOD], "rejected": [USER, GOOD, USER, BAD]})
    assert longer == read({"prompt": [USER], "chosen": [GOOD], "rejected": [GOOD, USER, BAD]})


def test_equal_sides_are_a_pair() -> None:
    """Its rendering names them."""
    assert read({**EXPLICIT, "rejected": [GOOD]}) == ChatPair(messages=ASKING, chosen=CHOSEN, rejected=CHOSEN)
    assert read({**TEXT, "rejected": "good"}) == CompletionPair(prompt="q: ", chosen="good", rejected="good")


def test_plain_texts_are_a_pair() -> None:
    assert read(TEXT) == CompletionPair(prompt="q: ", chosen="good", rejected="bad")
    assert read({**TEXT, "prompt": "", "tools": None}) == CompletionPair(
        prompt="", chosen="good", rejected="bad"
    )


@pytest.mark.parametrize(
    ("chosen", "rejected", "wanted"),
    [
        ("The sky is blue.", "The sky is green.", ("The sky is", " blue.", " green.")),
        ("Q: x\nA: yes", "Q: x\nA: no", ("Q: x\nA:", " yes", " no")),
        ("Q: x\nA:yes", "Q: x\nA:no", ("Q: x\nA:", "yes", "no")),
    ],
)
def test_an_implicit_text_is_cut_where_trl_cuts_it(
    chosen: str, rejected: str, wanted: tuple[str, str, str]
) -> None:
    prompt, good, bad = wanted
    assert read({"chosen": chosen, "rejected": rejected}) == CompletionPair(
        prompt=prompt, chosen=good, rejected=bad
    )


WORDS = st.text(st.sampled_from("ab \n"), max_size=6)


@given(WORDS, WORDS, WORDS)
def test_an_implicit_pair_of_texts_says_what_its_texts_said(start: str, one: str, other: str) -> None:
    chosen, rejected = start + one, start + other
    pair = read_or_reason({"chosen": chosen, "rejected": rejected})
    if not isinstance(pair, CompletionPair):
        assert pair in ("AMBIGUOUS_PROMPT", "EMPTY_FIELD")
        return
    assert (pair.prompt + pair.chosen, pair.prompt + pair.rejected) == (chosen, rejected)
    assert pair.prompt.strip()
    assert pair.chosen[:1] == pair.rejected[:1] == " " or pair.chosen[0] != pair.rejected[0]


TURNS = st.lists(st.sampled_from([SYSTEM, USER, GOOD, BAD]), max_size=4)


@given(TURNS, TURNS, TURNS)
def test_an_implicit_pair_says_what_its_conversations_said(
    start: list[Any], one: list[Any], other: list[Any]
) -> None:
    chosen, rejected = [*start, *one, GOOD], [*start, *other, BAD]
    pair = read_or_reason({"chosen": chosen, "rejected": rejected})
    if not isinstance(pair, ChatPair):
        assert pair in ("AMBIGUOUS_PROMPT", "WRONG_ROLE_ORDER")
        return
    for side, given_ in ((pair.chosen, chosen), (pair.rejected, rejected)):
        assert [one.content for one in (*pair.messages, *side)] == [turn["content"] for turn in given_]
        assert side[0].role == side[-1].role == "assistant"
    assert pair.messages[-1].role != "assistant"


@pytest.mark.parametrize("label", [True, False])
def test_a_label_is_of_the_completion(label: bool) -> None:
    plain = {"prompt": "q", "completion": "a", "label": label}
    assert read(plain, Format.UNPAIRED) == CompletionRecord(prompt="q", completion="a", label=label)
    value = {"prompt": [SYSTEM, USER], "completion": [GOOD], "label": label, "tools": [{"name": "f"}]}
    assert read(value, Format.UNPAIRED) == ChatRecord(
        messages=(Message(role="system", content="s"), *ASKING, *CHOSEN), tools=(TOOL,), label=label
    )


def test_weights_that_say_what_is_so_in_any_pair_are_left_out() -> None:
    value = {
        "prompt": [USER, {**GOOD, "weight": 0}, USER],
        "chosen": [{**GOOD, "weight": 1}],
        "rejected": [BAD],
    }
    assert read(value) == read({**value, "prompt": [USER, GOOD, USER], "chosen": [GOOD]})


@pytest.mark.parametrize(
    ("value", "path", "reason", "said"),
    [
        ({**OPENAI, "input": [USER]}, "input", "WRONG_TYPE", "an object with messages, got a list"),
        ({**OPENAI, "input": {}}, "input.messages", "WRONG_TYPE", "at least one message"),
        ({**OPENAI, "input": {"messages": []}}, "input.messages", "WRONG_TYPE", "at least one message"),
        ({**OPENAI, "input": {"messages": [USER], "model": "m"}}, "input.model", "UNKNOWN_FIELD", "'model'"),
        (
            {**OPENAI, "input": {"messages": [USER], "tools": "f"}},
            "input.tools",
            "WRONG_TYPE",
            "list of JSON objects",
        ),
        (
            {**OPENAI, "input": {"messages": [USER], "parallel_tool_calls": 1}},
            "input.parallel_tool_calls",
            "WRONG_TYPE",
            "true or false",
        ),
        (
            {**OPENAI, "input": {"messages": [USER, GOOD]}},
            "input.messages[1].role",
            "WRONG_ROLE_ORDER",
            "must end with a turn that asks, got assistant",
        ),
        ({**OPENAI, "preferred_output": []}, "preferred_output", "WRONG_TYPE", "at least one message"),
        ({**OPENAI, "preferred_output": GOOD}, "preferred_output", "WRONG_TYPE", "must be a list"),
        (
            {**OPENAI, "preferred_output": [USER, GOOD]},
            "preferred_output[0].role",
            "WRONG_ROLE_ORDER",
            "begin with an assistant's turn, got user",
        ),
        (
            {**OPENAI, "non_preferred_output": [BAD, USER]},
            "non_preferred_output[1].role",
            "WRONG_ROLE_ORDER",
            "last turn must be assistant",
        ),
        (
            {**OPENAI, "non_preferred_output": [{"role": "assistant", "content": ""}]},
            "non_preferred_output[0].content",
            "EMPTY_FIELD",
            "not be empty",
        ),
        ({**OPENAI, "score": 1}, "score", "UNKNOWN_FIELD", "must be one of"),
    ],
)
def test_a_bad_pair_of_openai_is_refused_where_it_is_wrong(
    value: dict[str, Any], path: str, reason: str, said: str
) -> None:
    with pytest.raises(RecordError, match=said) as caught:
        parse_record(value, Format.PREFERENCE_OPENAI)
    assert (caught.value.path, caught.value.reason) == (path, reason)


AMBIGUOUS = "write what both answer as prompt"


@pytest.mark.parametrize(
    ("value", "path", "reason", "said"),
    [
        (
            {**EXPLICIT, "prompt": "q"},
            "prompt",
            "WRONG_TYPE",
            "a list of messages, as the others are, got text",
        ),
        ({**EXPLICIT, "chosen": "good"}, "rejected", "WRONG_TYPE", "must be text, as the others are"),
        ({**EXPLICIT, "rejected": "bad"}, "rejected", "WRONG_TYPE", "must be a list of messages"),
        ({**TEXT, "prompt": [USER]}, "prompt", "WRONG_TYPE", "must be text, as the others are, got a list"),
        ({**TEXT, "chosen": None}, "chosen", "MISSING_FIELD", "got null"),
        ({**TEXT, "chosen": GOOD}, "chosen", "WRONG_TYPE", "must be text, as the others are, got an object"),
        ({**TEXT, "rejected": " "}, "rejected", "EMPTY_FIELD", "not be empty"),
        ({**TEXT, "tools": [TOOL]}, "tools", "WRONG_VALUE", "beside plain text"),
        ({**EXPLICIT, "prompt": []}, "prompt", "WRONG_TYPE", "at least one message"),
        (
            {**EXPLICIT, "prompt": [USER, GOOD]},
            "prompt[1].role",
            "WRONG_ROLE_ORDER",
            "whether an answer goes on",
        ),
        (
            {**EXPLICIT, "chosen": [USER, GOOD]},
            "chosen[0].role",
            "WRONG_ROLE_ORDER",
            "begin with an assistant",
        ),
        ({**EXPLICIT, "rejected": [BAD, USER]}, "rejected[1].role", "WRONG_ROLE_ORDER", "last turn must be"),
        ({**EXPLICIT, "rejected": []}, "rejected", "WRONG_TYPE", "at least one message"),
        (
            {**EXPLICIT, "prompt": [USER, {**GOOD, "weight": 1}, USER]},
            "prompt[1].weight",
            "WRONG_VALUE",
            "must be 0 or not be there: only the answers are learnt from",
        ),
        (
            {**EXPLICIT, "rejected": [{**BAD, "weight": 0}]},
            "rejected[0].weight",
            "WRONG_VALUE",
            "must be 1 or not be there: the answers are learnt from",
        ),
        ({"chosen": [GOOD], "rejected": [BAD]}, "rejected", "AMBIGUOUS_PROMPT", AMBIGUOUS),
        (
            {"chosen": [USER, GOOD], "rejected": [{**USER, "content": "other"}, BAD]},
            "rejected",
            "AMBIGUOUS_PROMPT",
            AMBIGUOUS,
        ),
        (
            {"chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, {**USER, "content": "other"}, BAD]},
            "chosen[1].role",
            "WRONG_ROLE_ORDER",
            "begin with an assistant's turn, got user",
        ),
        (
            {"chosen": [USER, GOOD, GOOD], "rejected": [USER, GOOD, BAD]},
            "chosen[1].role",
            "WRONG_ROLE_ORDER",
            "must end with a turn that asks",
        ),
        ({"chosen": "The sky", "rejected": "The sky is"}, "rejected", "AMBIGUOUS_PROMPT", AMBIGUOUS),
        ({"chosen": "The sky", "rejected": "The sky"}, "rejected", "AMBIGUOUS_PROMPT", AMBIGUOUS),
        ({"chosen": "yes", "rejected": "no"}, "rejected", "AMBIGUOUS_PROMPT", AMBIGUOUS),
        ({"chosen": " yes", "rejected": " no"}, "rejected", "AMBIGUOUS_PROMPT", AMBIGUOUS),
        ({"chosen": "Q: \n", "rejected": "Q: x"}, "chosen", "EMPTY_FIELD", "not be empty"),
        ({**EXPLICIT, "score": 1}, "score", "UNKNOWN_FIELD", "chosen, prompt, rejected, tools"),
        ({**EXPLICIT, "tools": "no"}, "tools", "INVALID_JSON", "must be JSON"),
    ],
)
def test_a_bad_pair_of_trl_is_refused_where_it_is_wrong(
    value: dict[str, Any], path: str, reason: str, said: str
) -> None:
    with pytest.raises(RecordError, match=said) as caught:
        parse_record(value, Format.PREFERENCE)
    assert (caught.value.path, caught.value.reason) == (path, reason)


@pytest.mark.parametrize(
    ("changes", "path", "reason", "said"),
    [
        ({"label": "good"}, "label", "WRONG_TYPE", r"true \(desirable\) or false, got text"),
        ({"label": 0}, "label", "WRONG_TYPE", "got a number"),
        ({"label": None}, "label", "MISSING_FIELD", "got null"),
        ({"prompt": "q"}, "prompt", "WRONG_TYPE", "must be a list of messages, as the others are, got text"),
        ({"completion": "a"}, "prompt", "WRONG_TYPE", "must be text, as the others are, got a list"),
        ({"completion": None}, "completion", "MISSING_FIELD", "must be text"),
        ({"completion": []}, "completion", "WRONG_TYPE", "at least one message"),
        ({"completion": [CALLING, RESULT, GOOD]}, "completion", "WRONG_VALUE", "one answer, got 3"),
        ({"prompt": [USER, GOOD]}, "prompt[1].role", "WRONG_ROLE_ORDER", "whether an answer goes on"),
        ({"completion": [USER]}, "completion[0].role", "WRONG_ROLE_ORDER", "must be assistant, got user"),
        (
            {"prompt": "q", "completion": " "},
            "completion",
            "EMPTY_FIELD",
            "not be empty",
        ),
        ({"prompt": "q", "completion": "a", "tools": [TOOL]}, "tools", "WRONG_VALUE", "beside plain text"),
        ({"completion": [{**GOOD, "weight": 0}]}, "completion[0].weight", "WRONG_VALUE", "must be 1 or not"),
    ],
)
def test_a_bad_label_is_refused_where_it_is_wrong(
    changes: dict[str, Any], path: str, reason: str, said: str
) -> None:
    with pytest.raises(RecordError, match=said) as caught:
        parse_record({**LABEL, **changes}, Format.UNPAIRED)
    assert (caught.value.path, caught.value.reason) == (path, reason)
