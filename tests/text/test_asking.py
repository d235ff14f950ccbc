"""What is asked is what was taught: a row's tokens before its answer are those of the prompt that asks for it."""

from __future__ import annotations

import datetime
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.text.conftest import (
    CHATML,
    END_LAST,
    GENERATION,
    KINDS,
    PLAIN,
    STRICT_ORDER,
    THINKING,
    make_bundle,
)

from luthier.text.records import ChatRecord, CompletionRecord, Message
from luthier.text.rendering import FindingKind, MaskMode, Rendered, Renderer
from luthier.text.templates import ChatTemplate, RenderedText, TemplateError

TODAY = datetime.date(2026, 3, 9)
# Their earlier turns stand unchanged in later texts.
STABLE = {"chatml": CHATML, "generation": GENERATION, "plain": PLAIN, "strict-order": STRICT_ORDER}
REWRITING = {"thinking": THINKING, "end-last": END_LAST}
EXACT = sorted(set(KINDS) - {"fused"})
texts = st.lists(
    st.sampled_from(
        ["the", " ", "answ", "ers", ":", "\n", " user", "ü", "\u0301", "語", "👍", "  ", "x", "\ta"]
    ),
    min_size=1,
    max_size=5,
).map("".join)
turns = st.lists(st.tuples(texts, texts.filter(str.strip)), min_size=1, max_size=3)


@cache
def chat_renderer(template: str, kind: str, mask_mode: MaskMode | None = None) -> Renderer:
    """One for all examples: a template takes longer to compile than to render."""
    return Renderer(make_bundle(template, kind), today=TODAY, mask_mode=mask_mode)


@cache
def plain_renderer(kind: str, adds_bos: bool) -> Renderer:
    return Renderer(make_bundle(None, kind, add_bos_token=adds_bos), today=TODAY)


def chat(pairs: list[tuple[str, str]]) -> ChatRecord:
    roles = ("user", "assistant")
    messages = (
        Message(role=role, content=content)
        for pair in pairs
        for role, content in zip(roles, pair, strict=True)
    )
    return ChatRecord(messages=tuple(messages))


def asked_before(rendered: Rendered) -> list[tuple[int, ...]]:
    """The tokens before each run of learnt ones."""
    mask = (False, *rendered.loss_mask)
    starts = [at for at in range(len(mask) - 1) if mask[at + 1] and not mask[at]]
    return [rendered.input_ids[:start] for start in starts]


@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize("adds_bos", [True, False])
@settings(max_examples=40, deadline=None)
@given(prompt=texts | st.just(""), completion=texts.filter(str.strip))
def test_a_plain_row_begins_with_the_prompts_tokens(
    kind: str, adds_bos: bool, prompt: str, completion: str
) -> None:
    used = plain_renderer(kind, adds_bos)
    record = CompletionRecord(prompt=prompt, completion=completion)
    asked = used.prompt(record)
    rendered = used.render(record)
    assert rendered.input_ids[: len(asked)] == asked
    assert rendered.loss_mask == (False,) * len(asked) + (True,) * (len(rendered.input_ids) - len(asked))
    # WordPiece makes one unknown token of a word that it does not know, however it is cut.
    inexact = any(finding.kind is FindingKind.INEXACT_BOUNDARY for finding in rendered.findings)
    assert not inexact or kind == "wordpiece"


@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize("template", STABLE.values(), ids=STABLE)
@settings(max_examples=12, deadline=None)
@given(pairs=turns)
def test_every_answer_of_a_row_is_learnt_behind_what_asks_for_it(
    kind: str, template: str, pairs: list[tuple[str, str]]
) -> None:
    used = chat_renderer(template, kind)
    record = chat(pairs)
    prompts = [used.prompt(chat(pairs[: count + 1])) for count in range(len(pairs))]
    assert asked_before(used.render(record)) == prompts
    assert asked_before(used.answer(record)) == prompts[-1:]


@pytest.mark.parametrize("kind", ["byte-level", "prepend"])
@pytest.mark.parametrize("template", [*STABLE.values(), *REWRITING.values()], ids=[*STABLE, *REWRITING])
@settings(max_examples=12, deadline=None)
@given(pairs=turns)
def test_rows_by_turn_are_learnt_behind_what_asks_for_them(
    kind: str, template: str, pairs: list[tuple[str, str]]
) -> None:
    used = chat_renderer(template, kind)
    record = chat(pairs)
    prompts = [used.prompt(chat(pairs[: count + 1])) for count in range(len(pairs))]
    rows = used.render_turns(record)
    assert [asked_before(row) for row in rows] == [[prompt] for prompt in prompts]
    last = chat_renderer(template, kind, MaskMode.LAST_TURN).render(record)
    assert asked_before(last) == prompts[-1:]
    assert (last.input_ids, last.loss_mask) == (rows[-1].input_ids, rows[-1].loss_mask)


def test_rows_by_turn_follow_weights() -> None:
    record = chat([("a", "no"), ("b", "yes"), ("c", "end")])
    weights = (None, 0.0, None, 1.0, None, None)
    messages = (replace(one, weight=weight) for one, weight in zip(record.messages, weights, strict=True))
    weighted = replace(record, messages=tuple(messages))
    bundle = make_bundle(CHATML)
    for mode, wanted in (
        (None, ["yes", "end"]),
        (MaskMode.MESSAGE_WEIGHT, ["yes", "end"]),
        (MaskMode.ALL_ASSISTANT_TURNS, ["no", "yes", "end"]),
        (MaskMode.LAST_TURN, ["end"]),
    ):
        rows = Renderer(bundle, today=TODAY, mask_mode=mode).render_turns(weighted)
        answers = [
            bundle.decode([one for one, on in zip(row.input_ids, row.loss_mask, strict=True) if on])
            for row in rows
        ]
        assert answers == wanted
    silent = replace(record, messages=tuple(replace(one, weight=0.0) for one in record.messages))
    assert Renderer(bundle, today=TODAY).render_turns(silent) == ()


def test_a_plain_record_is_one_row_by_turn() -> None:
    used = Renderer(make_bundle(None), today=TODAY)
    record = CompletionRecord(prompt="a:", completion=" b")
    assert used.render_turns(record) == (used.render(record),)


def test_the_last_turn_is_found_where_earlier_ones_are_rewritten() -> None:
    record = chat(
        [("2 plus 2?", "<think>\neasy\n</think>\n\n4"), ("thanks", "<think>\npolite\n</think>\n\nwelcome")]
    )
    bundle = make_bundle(THINKING)
    rendered = Renderer(bundle, today=TODAY, mask_mode=MaskMode.LAST_TURN).render(record)
    ids = [one for one, on in zip(rendered.input_ids, rendered.loss_mask, strict=True) if on]
    assert bundle.decode(ids, skip_special_tokens=False) == "<think>\npolite\n</think>\n\nwelcome<|im_end|>"
    whole = bundle.decode(rendered.input_ids, skip_special_tokens=False)
    assert "easy" not in whole
    (finding,) = rendered.findings
    assert finding.kind is FindingKind.TURN_NOT_WRITTEN
    assert finding.message == "message 1 (assistant): its text is missing"
    assert [row.findings for row in Renderer(bundle, today=TODAY).render_turns(record)] == [(), ()]


def test_a_template_that_marks_rewritten_turns_is_named() -> None:
    source = THINKING.replace(
        "{{- text + '<|im_end|>\n' }}",
        "{% generation %}{{- text + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}",
    )
    record = chat([("a", "<think>x</think>b"), ("c", "d")])
    rendered = Renderer(make_bundle(source), today=TODAY).render(record)
    kinds = {finding.kind: finding.message for finding in rendered.findings}
    assert kinds[FindingKind.TURN_NOT_WRITTEN] == "message 1 (assistant): its text is missing"
    assert FindingKind.ASKED_DIFFERENTLY not in kinds  # what asks for each stands before it
    dated = "{% if messages | length > 2 %}long\n{% endif %}" + source
    rendered = Renderer(make_bundle(dated), today=TODAY).render(record)
    differently = [one.message for one in rendered.findings if one.kind is FindingKind.ASKED_DIFFERENTLY]
    assert differently == ["message 1"]


def test_a_block_that_begins_inside_a_token_is_learnt_with_it_and_named() -> None:
    source = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ 'assistant: q' }}"
        "{% generation %}{{ 'answers' + m.content + eos_token }}{% endgeneration %}"
        "{% else %}{{ m.content + '\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    ).replace("'assistant: q'", "'assistant: '")
    bundle = make_bundle(source)
    rendered = Renderer(bundle, today=TODAY).render(chat([("hi", "x")]))
    ids = [one for one, on in zip(rendered.input_ids, rendered.loss_mask, strict=True) if on]
    assert bundle.decode(ids, skip_special_tokens=False) == " answersx<|im_end|>"
    assert [finding.kind for finding in rendered.findings] == [FindingKind.JOINED_BOUNDARY]


def test_rows_by_turn_take_time_by_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    rendered: list[int] = []
    whole = ChatTemplate.render

    def counted(template: ChatTemplate, messages: Any, **settings: Any) -> RenderedText:
        rendered.append(len(messages))
        return whole(template, messages, **settings)

    monkeypatch.setattr(ChatTemplate, "render", counted)
    used = Renderer(make_bundle(CHATML), today=TODAY)
    assert len(used.render_turns(chat([("a", f"b{number}") for number in range(30)]))) == 30
    assert len(rendered) <= 2 * 30


def test_a_template_that_refuses_to_ask_for_an_earlier_turn_still_asks_for_the_next() -> None:
    """Such a turn cannot be learnt, but may stand in what is asked."""
    template = "{% if messages | length == 1 and add_generation_prompt %}{{ raise_exception('too short') }}{% endif %}"
    record = chat([("a", "b"), ("c", "d")])
    used = Renderer(make_bundle(template + CHATML), today=TODAY, mask_mode=MaskMode.LAST_TURN)
    assert asked_before(used.render(record)) == [used.prompt(record)]
    with pytest.raises(TemplateError, match="too short"):
        Renderer(make_bundle(template + CHATML), today=TODAY).render(record)
