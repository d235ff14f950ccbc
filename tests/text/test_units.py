"""Units: both rows begin with the tokens that ask, the answers alone are learnt, and what teaches nothing says why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.text.conftest import (
    CALLS,
    CHATML,
    END_LAST,
    FORGETFUL,
    GENERATION,
    KINDS,
    PLAIN,
    THINKING,
    make_bundle,
)
from tests.text.test_rendering import TODAY, chat

from luthier.text.findings import FindingKind
from luthier.text.lengths import LengthLimit, LengthPolicy
from luthier.text.records import (
    ChatPair,
    ChatRecord,
    CompletionPair,
    CompletionRecord,
    Message,
    Record,
)
from luthier.text.rendering import Renderer, RenderingError
from luthier.text.units import (
    Unit,
    chosen_record,
    preference_unit,
    prompt_unit,
    taught_record,
    unpaired_unit,
)

WIDE = LengthLimit(max_tokens=10_000, policy=LengthPolicy.DROP)
ASKED = (
    Message(role="system", content="be short"),
    Message(role="user", content="hi"),
    Message(role="assistant", content="<think>a greeting</think>hello"),
    Message(role="user", content="more?"),
)
TEMPLATES = {
    "chatml": CHATML,
    "generation": GENERATION,
    "forgetful": FORGETFUL,
    "thinking": THINKING,
    "end-last": END_LAST,
    "plain": PLAIN,
}


def renderer(template: str | None = CHATML) -> Renderer:
    return Renderer(make_bundle(template), today=TODAY)


def answer(text: str, **fields: Any) -> tuple[Message, ...]:
    return (Message(role="assistant", content=text, **fields),)


def pair(chosen: str = "no, thanks", rejected: str = "never") -> ChatPair:
    return ChatPair(messages=ASKED, chosen=answer(chosen), rejected=answer(rejected))


def plain(chosen: str = " yes", rejected: str = " no") -> CompletionPair:
    return CompletionPair(prompt="the user asks:", chosen=chosen, rejected=rejected)


def limit(max_tokens: int, policy: LengthPolicy) -> LengthLimit:
    return LengthLimit(max_tokens=max_tokens, policy=policy)


def learnt(unit: Unit) -> list[str]:
    bundle = make_bundle(CHATML)
    return [
        bundle.decode(
            [token for token, on in zip(row.rendered.input_ids, row.rendered.loss_mask, strict=True) if on],
            skip_special_tokens=False,
        )
        for row in unit.rows
    ]


def roles(unit: Unit) -> list[str]:
    return [row.role.value for row in unit.rows]


def kinds(unit: Unit) -> list[FindingKind]:
    return [finding.kind for finding in unit.findings]


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_preference_unit_has_both_answers_behind_the_tokens_that_ask(name: str) -> None:
    """The prompt of both rows is what an evaluation asks with, and what a PROMPT rendering holds."""
    made, record = renderer(TEMPLATES[name]), pair()
    unit = preference_unit(made, record, WIDE)
    asking = made.prompt(ChatRecord(messages=(*ASKED, *answer("anything"))))
    assert roles(unit) == ["chosen", "rejected"]
    for row in unit.rows:
        assert row.rendered.input_ids[: len(asking)] == asking
        assert row.rendered.num_asking == len(asking)
        assert not any(row.rendered.loss_mask[: len(asking)])
    chosen, rejected = learnt(unit)
    assert ("no, thanks" in chosen, "never" in rejected) == (True, True)
    assert not any(text in chosen + rejected for text in ("hello", "greeting", "more?"))
    stops = made.stops()
    (prompt,) = prompt_unit(made, record, stops, WIDE).rows
    assert prompt.rendered.input_ids == asking
    assert unit.idle == ""


@pytest.mark.parametrize("prompt", ["the user asks:", "the user asks: ", ""])
def test_preference_unit_of_plain_text_has_the_tokens_of_its_prompt(prompt: str) -> None:
    """Also where the tokenizer would join the prompt's last character with the answer."""
    made = renderer(None)
    unit = preference_unit(made, CompletionPair(prompt=prompt, chosen="answers", rejected="words"), WIDE)
    asking = made.prompt(CompletionRecord(prompt=prompt, completion="x"))
    assert [row.rendered.input_ids[: len(asking)] for row in unit.rows] == [asking, asking]
    assert learnt(unit) == ["answers<|im_end|>", "words<|im_end|>"]


@pytest.mark.parametrize("tokenizer", sorted(KINDS))
@settings(max_examples=40, deadline=None)
@given(texts=st.lists(st.text(alphabet="the user-\n é🙂.:", min_size=1, max_size=20), min_size=3, max_size=3))
def test_units_of_any_text_begin_with_the_tokens_that_ask(tokenizer: str, texts: list[str]) -> None:
    """Whatever a tokenizer would join where the answer begins."""
    made = Renderer(make_bundle(None, tokenizer), today=TODAY)
    prompt, chosen, rejected = texts
    asking = made.prompt(CompletionRecord(prompt=prompt, completion="x"))
    record = CompletionPair(prompt=prompt, chosen=chosen, rejected=rejected)
    alone = CompletionRecord(prompt=prompt, completion=chosen, label=True)
    other = CompletionRecord(prompt="", completion=rejected)
    units = (preference_unit(made, record, WIDE), unpaired_unit(made, alone, other, WIDE))
    for row in (row for unit in units for row in unit.rows):
        assert row.rendered.input_ids[: len(asking)] == asking
        assert not any(row.rendered.loss_mask[: len(asking)])
    assert units[0].rows[0].rendered.input_ids == made.render(replace(alone, label=None)).input_ids


def test_preference_unit_learns_all_turns_of_a_side_and_none_of_the_prompt() -> None:
    tried = (*answer("let me see"), Message(role="tool", content="17"), *answer("it is 17"))
    record = ChatPair(messages=ASKED, chosen=tried, rejected=answer("no idea"))
    unit = preference_unit(renderer(), record, WIDE)
    assert learnt(unit) == ["let me see<|im_end|>it is 17<|im_end|>", "no idea<|im_end|>"]


def test_preference_unit_passes_tools_and_calls_to_the_template() -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    tools = ({"type": "function", "function": {"name": "add"}},)
    record = ChatPair(
        messages=(Message(role="user", content="sum"),),
        chosen=answer("", tool_calls=(call,)),
        rejected=answer("no"),
        tools=tools,
    )
    made = renderer(CALLS)
    unit = preference_unit(made, record, WIDE)
    assert '"add", "arguments": {"a": 1}}' in learnt(unit)[0]
    asking = made.prompt(ChatRecord(messages=(*record.messages, *answer("x")), tools=tools))
    assert unit.rows[1].rendered.input_ids[: len(asking)] == asking


def test_preference_unit_names_sides_that_are_equal_and_learns_nothing() -> None:
    unit = preference_unit(renderer(), pair("same", "same"), WIDE)
    assert kinds(unit) == [FindingKind.EQUAL_SIDES]
    assert unit.idle == "both sides are the same tokens"
    assert learnt(unit) == ["", ""]
    assert unit.rows[0].rendered.input_ids == unit.rows[1].rendered.input_ids


def test_preference_unit_names_sides_that_differ_only_beyond_the_limit() -> None:
    record = pair("the same beginning, and then a", "the same beginning, and then b")
    whole = preference_unit(renderer(), record, WIDE)
    assert (whole.idle, kinds(whole)) == ("", [])
    length = len(whole.rows[0].rendered.input_ids)
    cut = preference_unit(renderer(), record, limit(length - 3, LengthPolicy.TRUNCATE))
    assert kinds(cut) == [FindingKind.EQUAL_WITHIN_LIMIT]
    assert cut.idle == f"both sides are the same in their first {length - 3} tokens, where they are cut"
    assert learnt(cut) == ["", ""]
    longer = preference_unit(renderer(), record, limit(length - 2, LengthPolicy.TRUNCATE))
    assert (longer.idle, all(learnt(longer))) == ("", True)


def test_preference_unit_is_dropped_cut_or_refused_as_one() -> None:
    record = pair("short", "a longer answer of several words that goes on for a while")
    whole = preference_unit(renderer(), record, WIDE)
    short, long = (len(row.rendered.input_ids) for row in whole.rows)
    between = (short + long) // 2
    assert preference_unit(renderer(), record, limit(between, LengthPolicy.DROP)) == Unit()
    cut = preference_unit(renderer(), record, limit(between, LengthPolicy.TRUNCATE))
    assert [len(row.rendered.input_ids) for row in cut.rows] == [short, between]
    assert [row.rendered.truncated for row in cut.rows] == [False, True]
    with pytest.raises(RenderingError, match=f"^rejected: must have at most {between} tokens, got {long}$"):
        preference_unit(renderer(), record, limit(between, LengthPolicy.FAIL))


def test_preference_unit_learns_nothing_where_one_side_is_cut_away() -> None:
    """One side alone would be scored against nothing."""
    made = renderer()
    asking = len(made.prompt(chosen_record(pair())))
    call = ChatPair(messages=ASKED, chosen=answer("yes"), rejected=answer("", weight=None))
    unit = preference_unit(made, call, limit(asking, LengthPolicy.TRUNCATE))
    assert learnt(unit) == ["", ""]
    shorter = preference_unit(made, pair("a", "b"), limit(asking, LengthPolicy.TRUNCATE))
    assert kinds(shorter) == [FindingKind.EQUAL_WITHIN_LIMIT]


# It writes what asks differently once the answer is a short one: no two answers can stand behind the same tokens.
LOOKING_AHEAD = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>' }}"
    "{{ '!' if messages[-1].content | length < 4 else '?' }}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ '<|im_start|>' + m.content }}{% endif %}{% endfor %}"
)


def test_preference_unit_refuses_a_template_that_asks_by_what_is_answered() -> None:
    record = ChatPair(
        messages=(Message(role="user", content="q"),), chosen=answer("yes"), rejected=answer("never")
    )
    with pytest.raises(RenderingError, match="must write what stands before an answer") as caught:
        preference_unit(renderer(LOOKING_AHEAD), record, WIDE)
    assert caught.value.reason == "TEMPLATE_INVALID"
    assert "--chat-template" in caught.value.hint


def test_preference_unit_refuses_a_side_that_begins_without_weight() -> None:
    record = ChatPair(messages=ASKED, chosen=answer("yes"), rejected=answer("no", weight=0.0))
    with pytest.raises(RenderingError, match=r"^rejected\[0\]\.weight must be 1 or unset.*got 0"):
        preference_unit(renderer(), record, WIDE)


def labelled(text: str, *, label: bool = True) -> ChatRecord:
    return ChatRecord(messages=(*ASKED, *answer(text)), label=label)


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_unpaired_unit_has_the_answer_of_another_behind_the_same_prompt(name: str) -> None:
    made = renderer(TEMPLATES[name])
    other = ChatRecord(messages=answer("17"))
    unit = unpaired_unit(made, labelled("no, thanks", label=False), other, WIDE)
    asking = made.prompt(labelled("x"))
    assert roles(unit) == ["undesirable", "mismatched"]
    assert [row.rendered.input_ids[: len(asking)] for row in unit.rows] == [asking, asking]
    own, mismatched = learnt(unit)
    assert ("no, thanks" in own, "17" in mismatched, "hello" in own + mismatched) == (True, True, False)


def test_unpaired_unit_of_plain_text() -> None:
    record = CompletionRecord(prompt="the user asks: ", completion="answers", label=True)
    unit = unpaired_unit(renderer(None), record, CompletionRecord(prompt="", completion="words"), WIDE)
    assert roles(unit) == ["desirable", "mismatched"]
    assert learnt(unit) == ["answers<|im_end|>", "words<|im_end|>"]
    assert kinds(unit) == [FindingKind.JOINED_BOUNDARY]


def test_unpaired_unit_without_another_answer_is_named_and_learns_nothing() -> None:
    unit = unpaired_unit(renderer(), labelled("yes"), None, WIDE)
    assert (roles(unit), learnt(unit)) == (["desirable"], [""])
    assert kinds(unit) == [FindingKind.NO_MISMATCHED_ANSWER]
    assert unit.idle == "no other record has another prompt and another answer"


@pytest.mark.parametrize("policy", list(LengthPolicy))
def test_unpaired_unit_cuts_the_other_answer_whatever_the_policy(policy: LengthPolicy) -> None:
    """The record itself is not too long; another one's length must not drop it."""
    made = renderer()
    long = ChatRecord(messages=answer("a long answer " * 20))
    alone = unpaired_unit(made, labelled("short"), None, WIDE)
    most = len(alone.rows[0].rendered.input_ids)
    unit = unpaired_unit(made, labelled("short"), long, limit(most, policy))
    assert [len(row.rendered.input_ids) for row in unit.rows] == [most, most]
    assert [row.rendered.truncated for row in unit.rows] == [False, True]
    assert kinds(unit) == [FindingKind.MISMATCHED_CUT]
    assert (unit.idle, all(learnt(unit))) == ("", True)
    if policy is LengthPolicy.DROP:
        assert unpaired_unit(made, labelled("short"), long, limit(most - 1, policy)) == Unit()


def test_unpaired_unit_says_whose_answer_a_template_refuses() -> None:
    refusing = "{% for m in messages %}{% if m.content == 'bad' %}{{ raise_exception('no') }}{% endif %}" + (
        "<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    )
    made = renderer(refusing)
    with pytest.raises(ValueError, match=r"refuses its prompt with another record's answer: .*no"):
        unpaired_unit(made, labelled("good"), ChatRecord(messages=answer("bad")), WIDE)


RECORDS: Sequence[tuple[Record, str]] = [
    (chat(("user", "q"), ("assistant", "a")), "a conversation without a label"),
    (CompletionRecord(prompt="p", completion="c"), "a prompt-completion record without a label"),
    (CompletionRecord(prompt="p", completion="c", label=True), "a prompt-completion record with a label"),
    (labelled("a"), "a conversation with a label"),
    (pair(), "a pair"),
    (plain(), "a pair"),
]


@pytest.mark.parametrize(("record", "found"), RECORDS)
def test_units_refuse_records_that_do_not_suit_the_kind(record: Record, found: str) -> None:
    if found != "a pair":
        with pytest.raises(RenderingError, match=f"kind PREFERENCE needs pairs, got {found}$") as caught:
            preference_unit(renderer(), record, WIDE)
        assert caught.value.reason == "RENDERING_KIND_MISMATCH"
        assert caught.value.hint.startswith(
            "pass --kind unpaired (kind UNPAIRED)" if "with a" in found else "pass --kind supervised"
        )
    if "with a label" not in found:
        wanted = f"kind UNPAIRED needs answers with a label, got {found}$"
        with pytest.raises(RenderingError, match=wanted) as caught:
            unpaired_unit(renderer(), record, None, WIDE)
        assert caught.value.reason == "RENDERING_KIND_MISMATCH"


@pytest.mark.parametrize(("record", "_"), RECORDS)
def test_prompt_unit_asks_for_the_answer_of_any_record(record: Record, _: str) -> None:
    made = renderer()
    unit = prompt_unit(made, record, made.stops(), WIDE)
    taught = chosen_record(record) if isinstance(record, ChatPair | CompletionPair) else record
    (row,) = unit.rows
    assert (row.role, unit.idle, row.rendered.num_supervised) == ("prompt", "", 0)
    assert row.rendered.input_ids == made.prompt(taught)
    assert row.rendered.ending_ids == tuple(sorted(made.stops().token_ids))


def test_prompt_unit_is_dropped_or_refused_where_it_is_too_long() -> None:
    made, record = renderer(), pair()
    length = len(made.prompt(chosen_record(record)))
    stops = made.stops()
    assert prompt_unit(made, record, stops, limit(length, LengthPolicy.FAIL)).rows
    assert prompt_unit(made, record, stops, limit(length - 1, LengthPolicy.DROP)) == Unit()
    with pytest.raises(
        RenderingError, match=f"^prompt: must have at most {length - 1} tokens, got {length}$"
    ):
        prompt_unit(made, record, stops, limit(length - 1, LengthPolicy.FAIL))


def test_prompt_unit_refuses_a_prompt_without_a_token() -> None:
    made = renderer(None)
    with pytest.raises(RenderingError, match="at least one token to ask with, got none"):
        prompt_unit(made, CompletionRecord(prompt="", completion="c"), made.stops(), WIDE)


def test_prompt_unit_names_what_the_template_leaves_out_of_it() -> None:
    dropping = CHATML.replace(
        "message['content'] +", "(message['content'] if message['role'] != 'user' else '') +"
    )
    tools = ({"type": "function", "function": {"name": "add"}},)
    record = ChatRecord(messages=(Message(role="user", content="what"), *answer("a")), tools=tools)
    unit = prompt_unit(renderer(dropping), record, renderer(dropping).stops(), WIDE)
    assert [(one.kind, one.message) for one in unit.findings] == [
        (FindingKind.TURN_NOT_WRITTEN, "message 0 (user): its text is missing"),
        (FindingKind.TURN_NOT_WRITTEN, "tools: none of them is written"),
    ]
    assert prompt_unit(renderer(CALLS), record, renderer(CALLS).stops(), WIDE).findings == ()


def test_prompt_unit_says_when_nobody_knows_how_an_answer_ends() -> None:
    """Else what is sampled from it would go on to its greatest length, and nobody would know why."""
    silent = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    picky = "{% if messages | length < 4 %}{{ raise_exception('too short') }}{% endif %}" + CHATML
    record = pair()
    (finding,) = prompt_unit(renderer(silent), record, renderer(silent).stops(), WIDE).findings
    assert (finding.kind, finding.message) == (
        FindingKind.END_UNKNOWN,
        "the chat template ends a turn without a special token",
    )
    made = renderer(picky)
    assert made.stops().unknown
    unit = prompt_unit(made, record, made.stops(), WIDE)
    assert (unit.findings, unit.rows[0].rendered.ending_ids) == ((), tuple(renderer().stops().token_ids))
    short = ChatRecord(messages=(Message(role="user", content="q"), *answer("a")))
    with pytest.raises(ValueError, match="too short"):
        prompt_unit(made, short, made.stops(), WIDE)


def test_taught_record_takes_the_chosen_side_and_what_is_desirable() -> None:
    taught, (finding,) = taught_record(pair())
    assert taught == ChatRecord(messages=(*ASKED, *answer("no, thanks")))
    assert finding.kind is FindingKind.CHOSEN_SIDE_TAKEN
    taught, (finding,) = taught_record(plain())
    assert taught == CompletionRecord(prompt="the user asks:", completion=" yes")
    taught, (finding,) = taught_record(labelled("good"))
    assert taught == labelled("good")
    assert finding.kind is FindingKind.DESIRABLE_TAKEN
    taught, (finding,) = taught_record(labelled("bad", label=False))
    assert (taught, finding.kind) == (None, FindingKind.UNDESIRABLE_LEFT_OUT)
    plain_record = chat(("user", "q"), ("assistant", "a"))
    assert taught_record(plain_record) == (plain_record, ())
