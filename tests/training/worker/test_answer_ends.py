"""What a reward model is given of an answer ends as the rows do that it was taught by, whatever a template writes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import closing
from datetime import date
from typing import Any

import pytest
from tests.text.conftest import (
    CHATML,
    END_LAST,
    FORGETFUL,
    GENERATION,
    KINDS,
    PLAIN,
    STRICT_ORDER,
    THINKING,
    make_bundle,
)

from luthier.lm.generate import FinishReason
from luthier.runtime.digests import contents_digest
from luthier.text.lengths import LengthLimit, LengthPolicy
from luthier.text.records import (
    ChatPair,
    ChatRecord,
    CompletionPair,
    CompletionRecord,
    Message,
    PairRecord,
    record_to_json,
)
from luthier.text.rendering import Renderer
from luthier.text.tokenizer import CONFIG_FILE, TEMPLATE_FILE, TOKENIZER_FILE
from luthier.text.units import preference_unit
from luthier.training.recipes.rollouts import Rollout
from luthier.training.worker.answer_ends import AskText, answer_ends
from luthier.training.worker.reward_models import Judge, LoadedRewardModel
from luthier.v1.model_pb2 import Taught
from luthier.work.text_pool import Bundle, TextPool

TODAY = "2026-11-28"
WIDE = LengthLimit(max_tokens=10_000, policy=LengthPolicy.DROP)
SILENT = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
# As Phi-3 does: an end of text behind the end of the last turn.
TWO_ENDS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% else %}{{ '<|endoftext|>' }}{% endif %}"
)
NEEDS_SYSTEM = "{% if messages[0].role != 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
NEEDS_FOUR = "{% if messages | length < 4 %}{{ raise_exception('too short') }}{% endif %}" + CHATML
TEMPLATES = {
    "chatml": CHATML,
    "generation": GENERATION,
    "forgetful": FORGETFUL,
    "thinking": THINKING,
    "end-last": END_LAST,
    "plain": PLAIN,
    "strict-order": STRICT_ORDER,
    "two-ends": TWO_ENDS,
    "needs-system": NEEDS_SYSTEM,
}
USER, SYSTEM = Message(role="user", content="hi, you"), Message(role="system", content="be short")


@pytest.fixture(scope="module")
def pool() -> Iterator[TextPool]:
    with closing(TextPool()) as made:
        yield made


def asking(pool: TextPool, kind: str = "byte-level") -> AskText:
    settings = {"bos_token": "<s>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    files = {
        TOKENIZER_FILE: KINDS[kind],
        CONFIG_FILE: json.dumps(settings).encode(),
        TEMPLATE_FILE: b"{{ 'the base model has another one' }}",
    }
    bundle = Bundle(key=contents_digest(files), read=lambda: files)
    return lambda request: pool.ask(bundle, request)


def taught_by(template: str, made: Renderer) -> Taught:
    return Taught(
        chat_template=template,
        template_date=TODAY,
        prefix_token_ids=made.prefix_ids,
        stop_token_ids=sorted(made.stops().token_ids),
    )


def renderer(template: str, kind: str = "byte-level") -> Renderer:
    return Renderer(make_bundle(template, kind), today=date.fromisoformat(TODAY))


class Seen:
    """A reward model that remembers what it is to value."""

    def __init__(self) -> None:
        self.sequences: list[tuple[int, ...]] = []

    def values(self, sequences: list[tuple[int, ...]], *rest: Any) -> list[float]:
        self.sequences = sequences
        return [float(len(one)) for one in sequences]


def given(ask: AskText, taught: Taught, rollouts: list[Rollout], records: Mapping[int, str]) -> Any:
    """What a reward model that was taught so is given of answers."""
    seen: Any = Seen()
    stops = frozenset(taught.stop_token_ids)
    judge = Judge(
        loaded=LoadedRewardModel(name="judge", valuer=seen, taught=taught),
        ends=answer_ends(ask, taught, stops),
        stop_token_ids=stops,
        micro_batch_tokens=64,
    )
    assert judge.values(rollouts, records) == [float(len(one)) for one in seen.sequences]
    return seen.sequences


def drawn(
    prompt: tuple[int, ...], token_ids: tuple[int, ...], reason: FinishReason = FinishReason.STOP
) -> Rollout:
    return Rollout(
        group=0,
        sample=0,
        row=0,
        prompt=prompt,
        token_ids=token_ids,
        logprobs=(0.0,) * len(token_ids),
        finish_reason=reason,
    )


def pairs() -> list[ChatPair]:
    turns = (SYSTEM, USER)
    return [
        ChatPair(
            messages=turns,
            chosen=(Message(role="assistant", content=chosen),),
            rejected=(Message(role="assistant", content=rejected),),
        )
        for chosen, rejected in (("no, thanks", "never"), ("the words", "a few words of the assistant\nmore"))
    ]


def as_drawn(row: tuple[int, ...], num_asking: int, stops: frozenset[int]) -> tuple[int, ...]:
    """The tokens of a row's answer as they are drawn: up to the first one that ends an answer."""
    answer = row[num_asking:]
    return answer[: next(place for place, one in enumerate(answer) if one in stops) + 1]


@pytest.mark.parametrize("name", TEMPLATES)
def test_an_answer_that_ended_has_the_very_tokens_of_the_row_that_is_taught(
    pool: TextPool, name: str
) -> None:
    template = TEMPLATES[name]
    # This one takes no system turn.
    records: list[PairRecord] = [
        ChatPair(messages=(USER,), chosen=one.chosen, rejected=one.rejected)
        if name == "strict-order"
        else one
        for one in pairs()
    ]
    made = renderer(template)
    taught = taught_by(template, made)
    stops = frozenset(taught.stop_token_ids)
    for record in records:
        rows = [row.rendered for row in preference_unit(made, record, WIDE).rows]
        answers = [
            (row.input_ids[: row.num_asking], as_drawn(row.input_ids, row.num_asking, stops)) for row in rows
        ]
        prompt_json = {0: record_to_json(record)}
        found = given(asking(pool), taught, [drawn(*one) for one in answers], prompt_json)
        assert found == [row.input_ids for row in rows]
        # Validations leave the token that ended the answer out.
        bare = [drawn(prompt, answer[:-1]) for prompt, answer in answers]
        assert given(asking(pool), taught, bare, prompt_json) == found
        cut = [drawn(prompt, answer[:2], FinishReason.LENGTH) for prompt, answer in answers]
        assert given(asking(pool), taught, cut, prompt_json) == [
            (*prompt, *answer[:2]) for prompt, answer in answers
        ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", [CHATML, ""], ids=["with a template", "without"])
def test_an_answer_to_plain_text_ends_as_plain_rows_do(pool: TextPool, kind: str, template: str) -> None:
    record = CompletionPair(prompt="the user asks:", chosen=" a few words", rejected=" no")
    made = renderer(template or CHATML, kind)
    taught = taught_by(template, made)
    stops = frozenset(taught.stop_token_ids)
    rows = [row.rendered for row in preference_unit(made, record, WIDE).rows]
    answers = [drawn(row.input_ids[: row.num_asking], row.input_ids[row.num_asking :]) for row in rows]
    assert all(one.token_ids[-1] in stops for one in answers)
    found = given(asking(pool, kind), taught, answers, {0: record_to_json(record)})
    assert found == [row.input_ids for row in rows]


def test_an_answer_that_ended_by_another_token_gets_the_end_of_the_rows(pool: TextPool) -> None:
    """A model may write its end of text where the template writes an end of turn."""
    made = renderer(TWO_ENDS)
    taught = taught_by(TWO_ENDS, made)
    end_of_text = make_bundle(None).token_id("<|endoftext|>")
    assert end_of_text is not None
    taught.stop_token_ids.append(end_of_text)
    row = preference_unit(made, pairs()[0], WIDE).rows[0].rendered
    stops = frozenset(taught.stop_token_ids)
    text = as_drawn(row.input_ids, row.num_asking, stops)[:-1]
    prompt = row.input_ids[: row.num_asking]
    found = given(
        asking(pool), taught, [drawn(prompt, (*text, end_of_text))], {0: record_to_json(pairs()[0])}
    )
    assert found == [row.input_ids]
    assert row.input_ids[-1] == end_of_text


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (SILENT, "no token ends an answer in its rows"),
        (NEEDS_FOUR, "its template refuses an answer made up to see that: "),
    ],
    ids=["silent", "picky"],
)
def test_where_it_is_not_known_how_rows_end_an_answer_is_its_text(
    pool: TextPool, template: str, why: str
) -> None:
    made = renderer(template)
    taught = Taught(chat_template=template, template_date=TODAY, stop_token_ids=[2, 4])
    ends = answer_ends(asking(pool), taught, frozenset())
    assert ends.conversation.unknown.startswith(why)
    assert (ends.text.unknown, ends.text.token_ids) == ("", (made.raw("<|im_end|>")[-1],))
    record = ChatRecord(messages=(USER, Message(role="assistant", content="b")))
    plain = CompletionRecord(prompt="a", completion="b")
    assert ends.of(record_to_json(record)) == ends.conversation
    assert ends.of(record_to_json(plain)) == ends.text
    found = given(asking(pool), taught, [drawn((9, 8), (40, 41, 4))], {0: record_to_json(record)})
    assert found == [(9, 8, 40, 41)]
