"""A system prompt of an arm's own: which tokens ask then, what it leaves alone, and templates that do not write it."""

from __future__ import annotations

from collections import defaultdict
from datetime import date
from typing import Any

import pytest
from tests.evaluation.tiny_models import TEMPLATE

from luthier.errors import InvalidArgument, Reason
from luthier.errors.status import status_to_failure
from luthier.evaluation.worker.engine import EngineClient
from luthier.evaluation.worker.instructing import require_written
from luthier.lm.generate import GenerationRequest
from luthier.text.records import ChatRecord, CompletionRecord, Message, SingleRecord
from luthier.text.rendering import Renderer, RenderingError
from luthier.text.templates import TemplateError
from luthier.text.tokenizer import TokenizerBundle
from luthier.v1.evaluation_pb2 import Evaluation, EvaluationArm
from luthier.v1.evaluation_service_pb2 import CreateEvaluationRequest

WORDS = "say what number the thing has"
REFUSES = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    + TEMPLATE
)
IGNORES = TEMPLATE.replace(
    "{% for message in messages %}", "{% for message in messages if message.role != 'system' %}"
)


REFUSES_ONE = (
    "{% for message in messages if message.content == 'refuse me' %}{{ raise_exception('not this') }}{% endfor %}"
    + IGNORES
)


def under(record: SingleRecord, text: str) -> ChatRecord:
    assert isinstance(record, ChatRecord)
    asked = [message for message in record.messages if message.role != "system"]
    return ChatRecord(messages=(Message(role="system", content=text), *asked))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[int, tuple[int, ...]]]:
    """The tokens that engines were asked with, by arm and row."""
    found: dict[str, dict[int, tuple[int, ...]]] = defaultdict(dict)
    generate = EngineClient.generate

    def noting(client: EngineClient, request: GenerationRequest, *others: Any) -> Any:
        arm_id = request.request_id.split("/")[1]
        for index, prompt in enumerate(request.prompts):
            found[arm_id][request.first_row + index] = (*request.shared_prefix, *prompt)
        return generate(client, request, *others)

    monkeypatch.setattr(EngineClient, "generate", noting)
    return found


async def evaluated(site: Any, *arms: EvaluationArm) -> Evaluation:
    for arm in arms:
        arm.model = arm.model or f"{site.PARENT}/models/base"
    request = CreateEvaluationRequest(parent=site.PARENT)
    request.evaluation.CopyFrom(Evaluation(dataset_version=site.VERSION, arms=arms, max_new_tokens=4))
    made = await site.call("CreateEvaluation", request)
    async with site.worker():
        done: Evaluation = await site.ended(made.name)
    return done


async def test_an_arm_is_asked_under_its_own_system_prompt_and_others_as_records_say(
    site: Any, asked: dict[str, dict[int, tuple[int, ...]]]
) -> None:
    site.data.records["TEST"] = [under(record, "the records' own") for record in site.data.records["TEST"]]
    test = site.data.records["TEST"]
    done = await evaluated(
        site,
        EvaluationArm(arm_id="plain"),
        EvaluationArm(arm_id="told", system_prompt=WORDS),
        EvaluationArm(arm_id="few", system_prompt=WORDS, num_shots=2),
        EvaluationArm(arm_id="tuned", system_prompt=WORDS, model=f"{site.PARENT}/models/tuned"),
    )
    assert done.state == Evaluation.STATE_SUCCEEDED, done.error
    assert [arm.system_prompt for arm in done.arms] == ["", WORDS, WORDS, WORDS]
    renderer = Renderer(TokenizerBundle.load(site.models.folders["base"]), today=date(2026, 11, 23))
    for row, record in enumerate(test):
        assert asked["plain"][row] == renderer.prompt(record)
        assert asked["told"][row] == renderer.prompt(under(record, WORDS)) == asked["tuned"][row]
        begins = renderer.prompt(under(record, WORDS))[:8]
        assert asked["few"][row][:8] == begins, "before the examples"
        assert asked["few"][row][-8:] == asked["told"][row][-8:]
    likelihood = {one.arm_id: one.scores[-1].value for one in done.arm_results}
    assert done.arm_results[0].scores[-1].score == "perplexity"
    assert likelihood["plain"] != likelihood["told"], "the right answer is measured under it too"
    shown = (await site.predictions(done.name))[0].prompt
    assert shown[0].content == "the records' own", "what is shown is what records say"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (
            REFUSES,
            "arm told: the chat template refuses its system_prompt (.*System role not supported.*); give the arm",
        ),
        (
            IGNORES,
            "arm told: the chat template writes no system turn: its system_prompt would say nothing; give",
        ),
    ],
)
async def test_a_template_that_does_not_write_it_fails_the_evaluation_with_the_arms_name(
    site: Any, template: str, said: str
) -> None:
    done = await evaluated(
        site,
        EvaluationArm(arm_id="plain", chat_template=template),
        EvaluationArm(arm_id="told", chat_template=template, system_prompt=WORDS),
    )
    assert done.state == Evaluation.STATE_FAILED
    failure = status_to_failure(done.error)
    assert failure.reason == Reason.TEMPLATE_INVALID
    for part in said.split(".*"):
        assert part in failure.message


async def test_a_record_that_is_refused_for_reasons_of_its_own_hides_no_template_that_drops_it(
    site: Any,
) -> None:
    turns = (Message(role="user", content="refuse me"), Message(role="assistant", content="no"))
    site.data.records["TEST"][0] = ChatRecord(messages=turns)
    plain = await evaluated(site, EvaluationArm(arm_id="plain", chat_template=REFUSES_ONE))
    assert plain.state == Evaluation.STATE_SUCCEEDED, plain.error
    assert plain.arm_results[0].num_errors == 1
    told = await evaluated(site, EvaluationArm(arm_id="told", chat_template=REFUSES_ONE, system_prompt=WORDS))
    assert told.state == Evaluation.STATE_FAILED
    assert "arm told: the chat template writes no system turn" in told.error.message


async def test_plain_text_has_no_place_for_it(site: Any) -> None:
    for split in ("TRAIN", "TEST"):
        site.data.records[split] = [
            CompletionRecord(prompt=f"thing {number} is", completion=" red") for number in range(4)
        ]
    done = await evaluated(site, EvaluationArm(arm_id="told", system_prompt=WORDS))
    assert done.state == Evaluation.STATE_FAILED
    assert "arm told could answer none of 4 records" in done.error.message
    assert "a system_prompt needs a conversation to stand before" in done.error.message


def test_a_record_that_is_refused_anyway_says_nothing_of_system_prompts() -> None:
    def refuses(text: str) -> tuple[int, ...]:
        raise TemplateError(f"no such record {text}")

    def has_no_turns(text: str) -> tuple[int, ...]:
        raise RenderingError("INVALID_FIELD", "no turns")

    def drops(text: str) -> tuple[int, ...]:
        return (1, 2)

    require_written("a", "text", [refuses, has_no_turns])
    require_written("a", "text", [])
    require_written("a", "", [drops])
    with pytest.raises(InvalidArgument, match="arm a: the chat template writes no system turn"):
        require_written("a", "text", [refuses, has_no_turns, drops])


def test_the_first_record_that_is_taken_under_a_system_prompt_decides() -> None:
    tried = []

    def refuses_it(text: str) -> tuple[int, ...]:
        tried.append(text)
        if text:
            raise TemplateError("no system turn beside tools")
        return (1,)

    def writes(text: str) -> tuple[int, ...]:
        return tuple(map(ord, text))

    def drops(text: str) -> tuple[int, ...]:
        return (1, 2)

    require_written("a", "text", [refuses_it, writes, drops])
    with pytest.raises(InvalidArgument, match="writes no system turn"):
        require_written("a", "text", [refuses_it, drops, writes])
    with pytest.raises(InvalidArgument, match=r"refuses its system_prompt \(no system turn beside tools\)"):
        require_written("a", "text", [refuses_it])
    tried.clear()
    with pytest.raises(InvalidArgument, match="refuses its system_prompt"):
        require_written("a", "text", [refuses_it] * 10_000)
    assert len(tried) < 100, "a template that always refuses is not asked for each record"


def test_a_default_that_says_the_same_is_written_all_the_same() -> None:
    """Some templates put a system turn of their own where there is none."""
    require_written("a", "be kind", [lambda text: tuple(map(ord, text or "be kind"))])
