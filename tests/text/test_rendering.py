"""Tokens and masks: equal to transformers' own rendering, and learnt exactly where an assistant speaks."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path
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
    STRICT_ORDER,
    TEMPLATES,
    TOKENIZER_JSON,
    make_bundle,
    template_processing,
    train_tokenizer,
    with_post_processor,
)
from tokenizers import processors

from luthier.text.records import ChatRecord, CompletionRecord, Message, message_to_object
from luthier.text.rendering import (
    FindingKind,
    MaskMode,
    Rendered,
    Renderer,
    RenderingError,
    reference_text,
)
from luthier.text.spans import TemplateNotPrefixPreserving
from luthier.text.templates import TemplateError
from luthier.text.tokenizer import CONFIG_FILE, TOKENIZER_FILE, TokenizerBundle

TODAY = datetime.date(2026, 3, 9)


def chat(*turns: tuple[str, str], weights: Sequence[float | None] = ()) -> ChatRecord:
    padded = [*weights, *[None] * len(turns)]
    messages = (
        Message(role=role, content=content, weight=weight)
        for (role, content), weight in zip(turns, padded, strict=False)
    )
    return ChatRecord(messages=tuple(messages))


TWO_TURNS = chat(("user", "hi"), ("assistant", "hello"), ("user", "more?"), ("assistant", "no, thanks"))


def learnt(renderer: Renderer, rendered: Rendered, template: str = CHATML) -> str:
    bundle = make_bundle(template)
    ids = [token for token, on in zip(rendered.input_ids, rendered.loss_mask, strict=True) if on]
    return bundle.decode(ids, skip_special_tokens=False)


def renderer(template: str | None = CHATML, mode: MaskMode | None = None) -> Renderer:
    return Renderer(make_bundle(template), today=TODAY, mask_mode=mode)


def oracle(
    template: str, record: ChatRecord, folder: Path, *, add_generation_prompt: bool = False
) -> list[int]:
    """What transformers makes of the same conversation."""
    from transformers import PreTrainedTokenizerFast

    (folder / "tokenizer.json").write_bytes(TOKENIZER_JSON)
    tokenizer: Any = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_file=str(folder / "tokenizer.json"),
        bos_token="<s>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=template,
    )
    messages = [message_to_object(message) for message in record.messages]
    tools = [dict(tool) for tool in record.tools] or None
    text = tokenizer.apply_chat_template(
        messages, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt
    )
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert isinstance(ids, list)
    return ids


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_render_gives_the_tokens_of_apply_chat_template(name: str, tmp_path: Path) -> None:
    template = TEMPLATES[name]
    today = datetime.date.today() if name == "dated" else TODAY  # the oracle takes the clock's date
    ours = Renderer(make_bundle(template), today=today).render(TWO_TURNS)
    assert list(ours.input_ids) == oracle(template, TWO_TURNS, tmp_path)


def test_render_passes_tools_to_the_template(tmp_path: Path) -> None:
    tools = ({"type": "function", "function": {"name": "f<&>", "parameters": {"ü": 1}}},)
    record = ChatRecord(messages=TWO_TURNS.messages, tools=tools)
    ours = renderer(TEMPLATES["tools"]).render(record)
    assert list(ours.input_ids) == oracle(TEMPLATES["tools"], record, tmp_path)


@pytest.mark.parametrize("name", ["chatml", "generation", "tools"])
def test_prompt_ends_with_the_generation_prompt(name: str, tmp_path: Path) -> None:
    asked = ChatRecord(messages=TWO_TURNS.messages[:-1])
    wanted = oracle(TEMPLATES[name], asked, tmp_path, add_generation_prompt=True)
    assert list(renderer(TEMPLATES[name]).prompt(TWO_TURNS)) == wanted


@pytest.mark.parametrize("template", [CHATML, GENERATION])
@pytest.mark.parametrize(
    ("mode", "wanted"),
    [
        (None, "hello<|im_end|>no, thanks<|im_end|>"),
        (MaskMode.ALL_ASSISTANT_TURNS, "hello<|im_end|>no, thanks<|im_end|>"),
        (MaskMode.LAST_TURN, "no, thanks<|im_end|>"),
    ],
)
def test_mask_modes_choose_the_turns_that_are_learnt(
    template: str, mode: MaskMode | None, wanted: str
) -> None:
    used = renderer(template, mode)
    assert learnt(used, used.render(TWO_TURNS)) == wanted


def test_weights_decide_unless_all_turns_are_asked_for() -> None:
    record = chat(
        ("user", "a"),
        ("assistant", "no"),
        ("user", "b"),
        ("assistant", "yes"),
        weights=(None, 0.0, None, 1.0),
    )
    for mode, wanted in (
        (None, "yes<|im_end|>"),
        (MaskMode.MESSAGE_WEIGHT, "yes<|im_end|>"),
        (MaskMode.ALL_ASSISTANT_TURNS, "no<|im_end|>yes<|im_end|>"),
    ):
        used = renderer(CHATML, mode)
        assert learnt(used, used.render(record)) == wanted


def test_all_weights_zero_leave_nothing_to_learn() -> None:
    record = chat(("user", "a"), ("assistant", "b"), weights=(None, 0.0))
    assert renderer().render(record).num_supervised == 0


def test_the_first_token_is_never_counted_as_learnt() -> None:
    assert Rendered(input_ids=(1, 2, 3), loss_mask=(True, False, True)).num_supervised == 1
    assert Rendered(input_ids=(1,), loss_mask=(True,)).num_supervised == 0


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    record = chat(("user", "a"), ("assistant", "<think>x</think>b"), ("user", "c"), ("assistant", "d"))
    with pytest.raises(TemplateNotPrefixPreserving, match=r"message 1.*<think>x") as caught:
        renderer(FORGETFUL).render(record)
    assert caught.value.reason == "TEMPLATE_NOT_PREFIX_PRESERVING"
    for option in ("--split-turns", "--mask last-turn", "--chat-template FILE", "generation"):
        assert option in caught.value.hint


def test_a_model_without_template_takes_prompt_completion_only() -> None:
    with pytest.raises(RenderingError, match="no chat template") as caught:
        renderer(None).render(TWO_TURNS)
    assert caught.value.reason == "CHAT_TEMPLATE_MISSING"
    rendered = renderer(None).render(CompletionRecord(prompt="one ", completion="two"))
    assert learnt(renderer(None), rendered) == "two<|im_end|>"


def test_prompt_completion_begins_with_bos_where_the_tokenizer_says_so() -> None:
    used = Renderer(with_post_processor(template_processing("<s>", "$A")), today=TODAY)
    record = CompletionRecord(prompt="one ", completion="two")
    rendered = used.render(record)
    bos = make_bundle(None).special_id("bos_token")
    assert rendered.input_ids[0] == bos
    assert not rendered.loss_mask[0]
    assert used.prompt(record)[0] == bos
    assert rendered.input_ids.count(bos) == 1
    assert used.raw("one ") == used.prompt(record)
    assert used.raw("<s>one ") == used.raw("one ")  # a text that brings its own gets no second one


@pytest.mark.parametrize("mode", [MaskMode.LAST_TURN, MaskMode.ALL_ASSISTANT_TURNS])
def test_a_mask_mode_for_chats_refuses_prompt_completion(mode: MaskMode) -> None:
    with pytest.raises(RenderingError, match=mode):
        renderer(CHATML, mode).render(CompletionRecord(prompt="a", completion="b"))


def test_the_mask_mode_completion_refuses_chats() -> None:
    with pytest.raises(RenderingError, match="got a conversation"):
        renderer(CHATML, MaskMode.COMPLETION).render(TWO_TURNS)


def test_a_template_that_refuses_a_conversation_says_why() -> None:
    with pytest.raises(TemplateError, match="roles must alternate"):
        renderer(STRICT_ORDER).render(chat(("system", "x"), ("user", "a"), ("assistant", "b")))


def test_shots_stand_between_the_system_turn_and_the_question() -> None:
    shot = chat(("system", "other"), ("user", "q"), ("assistant", "a"))
    record = chat(("system", "own"), ("user", "question"), ("assistant", "answer"))
    text = make_bundle(CHATML).decode(renderer().prompt(record, [shot]), skip_special_tokens=False)
    assert text == (
        "<|im_start|>system\nown<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"
        "<|im_start|>user\nquestion<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_system_turn_in_the_middle_stays_where_it_is() -> None:
    record = chat(("user", "q"), ("system", "be brief"), ("assistant", "a"))
    text = make_bundle(CHATML).decode(renderer().prompt(record), skip_special_tokens=False)
    assert text.endswith(
        "<|im_start|>user\nq<|im_end|>\n<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>assistant\n"
    )


def test_answer_learns_the_last_turn_behind_the_same_prompt() -> None:
    shot = chat(("user", "q"), ("assistant", "a"))
    used = renderer()
    answer = used.answer(TWO_TURNS, [shot])
    prompt = used.prompt(TWO_TURNS, [shot])
    assert answer.input_ids[: len(prompt)] == prompt
    assert not any(answer.loss_mask[: len(prompt)])
    assert learnt(used, answer) == "no, thanks<|im_end|>"


def test_prompt_completion_shots_are_joined_as_text() -> None:
    shot = CompletionRecord(prompt="1+1=", completion="2")
    record = CompletionRecord(prompt="2+2=", completion="4")
    text = make_bundle(None).decode(renderer(None).prompt(record, [shot]))
    assert text == "1+1=2\n\n2+2="


def test_stop_tokens_hold_the_end_of_turn() -> None:
    bundle = make_bundle(CHATML, eos_token="</s>")
    stops = Renderer(bundle, today=TODAY).stops()
    assert stops.unknown == ""
    assert stops.token_ids == {bundle.token_id("</s>"), bundle.token_id("<|im_end|>")}


def test_a_template_without_end_of_turn_is_warned_about() -> None:
    plain = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    plain += "{% if add_generation_prompt %}assistant: {% endif %}"
    rendered = renderer(plain).render(TWO_TURNS)
    assert [(one.kind, one.message) for one in rendered.findings] == [
        (
            FindingKind.END_NOT_LEARNT,
            f"message {index}: the chat template ends it without a special token",
        )
        for index, message in enumerate(TWO_TURNS.messages)
        if message.role == "assistant"
    ]
    assert rendered.ending_ids == ()
    assert renderer(CHATML).render(TWO_TURNS).findings == ()


def test_reference_text_is_the_last_answer() -> None:
    assert reference_text(TWO_TURNS) == "no, thanks"
    assert reference_text(CompletionRecord(prompt="a", completion="b")) == "b"


# Without the characters of the template's own marks; anything else goes, also several scripts and emoji.
contents = st.text(alphabet=st.characters(exclude_categories=["Cs", "Co"]), min_size=1, max_size=30).filter(
    lambda text: text.strip() == text and "<|" not in text
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(contents, contents), min_size=1, max_size=4), st.sampled_from([CHATML, GENERATION]))
def test_exactly_what_the_assistant_says_is_learnt(pairs: list[tuple[str, str]], template: str) -> None:
    turns = [turn for question, answer in pairs for turn in (("user", question), ("assistant", answer))]
    used = renderer(template)
    rendered = used.render(chat(*turns))
    wanted = "".join(f"{answer}<|im_end|>" for _, answer in pairs)
    assert learnt(used, rendered) == wanted


def test_a_record_cannot_mark_its_own_text_as_learnt(tmp_path: Path) -> None:
    record = chat(("user", "\ue000\ue001learn me\ue001\ue000"), ("assistant", "x"))
    used = renderer(GENERATION)
    rendered = used.render(record)
    assert learnt(used, rendered) == "x<|im_end|>"
    assert list(rendered.input_ids) == oracle(GENERATION, record, tmp_path)


@pytest.mark.parametrize(
    ("prompt", "completion", "joins"),
    [
        ("q: ", "answers", True),  # the whole text has the token " answers", which starts in the prompt
        ("q:", " answers   ", False),
    ],
)
def test_an_answer_is_learnt_whole_wherever_its_prompt_ends(
    prompt: str, completion: str, joins: bool
) -> None:
    tokenizer = train_tokenizer()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    files = {TOKENIZER_FILE: tokenizer.to_str().encode(), CONFIG_FILE: b'{"eos_token": "<|im_end|>"}'}
    used = Renderer(TokenizerBundle(files), today=TODAY)
    rendered = used.render(CompletionRecord(prompt=prompt, completion=completion))
    assert learnt(used, rendered) == f"{completion}<|im_end|>"
    asked = used.prompt(CompletionRecord(prompt=prompt, completion=completion))
    assert rendered.input_ids[: len(asked)] == asked
    assert [finding.kind for finding in rendered.findings] == [FindingKind.JOINED_BOUNDARY] * joins
    assert all("'q: ' and 'answers'" in finding.message for finding in rendered.findings)


def test_a_tokenizer_without_end_of_sequence_is_warned_about() -> None:
    record = CompletionRecord(prompt="what ", completion="number")
    for template in (None, CHATML):  # beside a template, too, plain records end with it
        found = Renderer(make_bundle(template, eos_token=None), today=TODAY).render(record).findings
        assert [(one.kind, one.message) for one in found if one.kind is FindingKind.END_NOT_LEARNT] == [
            (FindingKind.END_NOT_LEARNT, "the completion: the tokenizer names no eos_token")
        ]
        assert FindingKind.END_NOT_LEARNT not in [one.kind for one in renderer(None).render(record).findings]


@pytest.mark.parametrize("arguments", ['{"symbol": "XYZ"}', {"symbol": "XYZ"}])
def test_arguments_are_learnt_and_asked_as_objects(arguments: object) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "price", "arguments": arguments}}
    record = ChatRecord(
        messages=(
            Message(role="user", content="Price?"),
            Message(role="assistant", content="", tool_calls=(call,)),
            Message(role="tool", content="12", tool_call_id="1"),
            Message(role="assistant", content="It is 12."),
        )
    )
    used = renderer(CALLS)
    rendered = used.render(record)
    assert '"arguments": {"symbol": "XYZ"}' in learnt(used, rendered)
    assert rendered.findings == ()
    asked = used.conversation([message_to_object(message) for message in record.messages[:-1]])
    assert asked == used.prompt(record) == rendered.input_ids[: len(asked)]
    assert '"arguments": {"symbol": "XYZ"}' in make_bundle(None).decode(asked)


def test_arguments_that_are_no_object_are_named() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "price", "arguments": "XYZ"}}
    messages = (Message(role="user", content="a"), Message(role="assistant", content="", tool_calls=(call,)))
    (finding,) = renderer(CALLS).render(ChatRecord(messages=messages)).findings
    assert finding.kind is FindingKind.ARGUMENTS_NOT_OBJECT
    assert finding.message == "message 1: the arguments are 'XYZ'"


def test_an_answer_without_a_token_but_its_end_is_named() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "price", "arguments": "{}"}}
    messages = (Message(role="user", content="a"), Message(role="assistant", content="", tool_calls=(call,)))
    findings = renderer(CHATML).render(ChatRecord(messages=messages)).findings
    assert [finding.kind for finding in findings] == [
        FindingKind.ONLY_END_LEARNT,
        FindingKind.TURN_NOT_WRITTEN,
    ]


def test_the_last_turn_alone_need_be_found_when_it_alone_is_learnt() -> None:
    record = chat(("user", "hello"), ("assistant", "hi"), ("user", "bye"), ("assistant", "goodbye"))
    used = renderer(END_LAST, MaskMode.LAST_TURN)
    assert learnt(used, used.render(record)) == "goodbye<|im_end|>"
    answer = renderer(END_LAST).answer(record)
    assert answer.input_ids[: len(used.prompt(record))] == used.prompt(record)
    with pytest.raises(TemplateNotPrefixPreserving):
        renderer(END_LAST).render(record)


def test_a_last_turn_that_is_written_otherwise_than_asked_is_refused_with_what_helps() -> None:
    template = CHATML.replace("<|im_start|>assistant\n' }}", "<|im_start|>assistant\n<think>' }}")
    with pytest.raises(TemplateNotPrefixPreserving, match=r"message 1 .* once the answer follows") as caught:
        renderer(template).render(chat(("user", "a"), ("assistant", "b")))
    assert "--chat-template FILE" in caught.value.hint
    assert "--split-turns" not in caught.value.hint
