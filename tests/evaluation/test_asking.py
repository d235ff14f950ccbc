"""Which template each arm is asked with, and that the choice is written down."""

from __future__ import annotations

from datetime import date

import pytest
from tests.evaluation.evaluations.conftest import draft

from luthier.errors import FailedPrecondition, InvalidArgument, Reason
from luthier.evaluation.asking import MAX_TEMPLATES_BYTES, as_taught, askings
from luthier.evaluation.evaluations.rules import MAX_SYSTEM_CHARACTERS, check, resolved
from luthier.runtime.server import MAX_MESSAGE_BYTES
from luthier.v1.evaluation_pb2 import (
    ARM_TEMPLATE_BASE,
    ARM_TEMPLATE_TAUGHT,
    TEMPLATE_SOURCE_ARM,
    TEMPLATE_SOURCE_BASE,
    TEMPLATE_SOURCE_TAUGHT,
    ArmTemplate,
    EvaluationArm,
)
from luthier.v1.model_pb2 import Model, Taught
from luthier.worker.v1.task_pb2 import ArmModel, Asking, EvaluateSpec, PrefixTokens

TODAY = date(2026, 11, 28)
EOS = [9, 11]
FIRST = Taught(chat_template="first", template_date="2026-01-01", prefix_token_ids=[1], stop_token_ids=[2])
SECOND = Taught(chat_template="second", template_date="2026-02-02", stop_token_ids=[3])
Contender = tuple[EvaluationArm, Model]


def contender(
    arm_id: str,
    taught: Taught | None = None,
    *,
    chat_template: str = "",
    template: ArmTemplate.ValueType = ArmTemplate.ARM_TEMPLATE_UNSPECIFIED,
    base: str = "base",
) -> Contender:
    """An arm and its model, which is of the same name."""
    arm = EvaluationArm(arm_id=arm_id, model=arm_id, chat_template=chat_template, template=template)
    return arm, Model(name=arm_id, base_model=base, taught=taught)


def ask(*contenders: Contender, base_has_template: bool = True) -> dict[str, Asking]:
    arms = [arm for arm, _ in contenders]
    models = {model.name: model for _, model in contenders}
    below = [
        Model(name="base", tokenizer_digest="t1", has_chat_template=base_has_template, eos_token_ids=EOS),
        Model(name="twin", tokenizer_digest="t1", has_chat_template=base_has_template, eos_token_ids=[7]),
        Model(name="alien", tokenizer_digest="t2", has_chat_template=base_has_template, eos_token_ids=[8]),
    ]
    found = askings(arms, {**{one.name: one for one in below}, **models}, TODAY)
    return dict(zip(models, found, strict=True))


def test_tuned_arms_are_asked_as_each_was_taught_and_bases_as_themselves() -> None:
    found = ask(contender("zero"), contender("a", FIRST), contender("b", SECOND))
    as_itself = Asking(template_source=TEMPLATE_SOURCE_BASE, template_date="2026-11-28", eos_token_ids=EOS)
    assert found["zero"] == as_itself
    for arm_id, taught in (("a", FIRST), ("b", SECOND)):
        assert found[arm_id].template_source == TEMPLATE_SOURCE_TAUGHT
        assert found[arm_id].chat_template == taught.chat_template
        assert found[arm_id].template_date == taught.template_date
        assert found[arm_id].HasField("prefix")
        assert found[arm_id].prefix.token_ids == taught.prefix_token_ids
        assert found[arm_id].stop_token_ids == taught.stop_token_ids
        assert found[arm_id].eos_token_ids == EOS
        assert not found[arm_id].old_prefix


def test_what_was_taught_before_its_tokens_were_kept_says_no_prefix() -> None:
    old = Model(taught=Taught(chat_template="old", template_date="2025-01-01"))
    asking = as_taught(old, Model(), TODAY)
    assert (asking.template_source, asking.chat_template) == (TEMPLATE_SOURCE_TAUGHT, "old")
    assert (asking.HasField("prefix"), list(asking.stop_token_ids)) == (False, [])


def test_a_base_without_a_template_is_asked_as_the_first_tuned_arm_was_taught_and_says_so() -> None:
    found = ask(contender("few"), contender("a", FIRST), contender("b", SECOND), base_has_template=False)
    assert (found["few"].template_source, found["few"].chat_template) == (TEMPLATE_SOURCE_TAUGHT, "first")
    alone = ask(contender("few"), base_has_template=False)
    assert alone["few"].template_source == TEMPLATE_SOURCE_BASE


def test_an_arm_can_name_another_template_on_purpose() -> None:
    found = ask(
        contender("own", FIRST, chat_template="mine"),
        contender("plain", FIRST, template=ARM_TEMPLATE_BASE),
        contender("zero", template=ARM_TEMPLATE_TAUGHT),
    )
    assert found["own"] == Asking(
        template_source=TEMPLATE_SOURCE_ARM,
        chat_template="mine",
        template_date="2026-01-01",
        prefix=PrefixTokens(token_ids=[1]),
        stop_token_ids=[2],
        eos_token_ids=EOS,
    )
    assert found["plain"] == Asking(
        template_source=TEMPLATE_SOURCE_BASE, template_date="2026-11-28", eos_token_ids=EOS
    )
    assert (found["zero"].template_source, found["zero"].chat_template) == (TEMPLATE_SOURCE_TAUGHT, "first")


def test_arms_on_several_bases_are_asked_each_as_its_own_base_says() -> None:
    found = ask(
        contender("one"), contender("two", base="alien"), contender("taught", FIRST), contender("b", base="")
    )
    assert [list(found[arm].eos_token_ids) for arm in ("one", "two", "taught", "b")] == [EOS, [8], EOS, []]


def test_what_was_taught_is_taken_over_by_a_model_on_another_base_with_the_same_tokenizer() -> None:
    found = ask(
        contender("foreign", Taught(chat_template="foreign", tokenizer_digest="t2"), base="alien"),
        contender("first", FIRST),
        contender("zero", template=ARM_TEMPLATE_TAUGHT, base="twin"),
        contender("lacking", base="twin"),
        contender("lacking-alien", base="alien"),
        base_has_template=False,
    )
    for arm_id, template, eos in (
        ("zero", "first", [7]),
        ("lacking", "first", [7]),
        ("lacking-alien", "foreign", [8]),
    ):
        assert (found[arm_id].chat_template, list(found[arm_id].eos_token_ids)) == (template, eos), arm_id


def test_a_base_takes_over_what_a_model_with_all_its_weights_was_taught_from_it() -> None:
    """Whose tokenizer bundle is another one: its chat template is part of it."""
    whole = Model(
        name="whole",
        tokenizer_digest="t1 with another template",
        taught=Taught(chat_template="new", tokenizer_digest="t1"),
    )
    found = ask(
        contender("zero", template=ARM_TEMPLATE_TAUGHT), (EvaluationArm(arm_id="whole", model="whole"), whole)
    )
    assert (found["zero"].template_source, found["zero"].chat_template) == (TEMPLATE_SOURCE_TAUGHT, "new")


def test_what_was_taught_in_other_tokens_is_not_taken_over_and_the_arm_is_told_so() -> None:
    with pytest.raises(FailedPrecondition) as caught:
        ask(contender("zero", template=ARM_TEMPLATE_TAUGHT, base="alien"), contender("first", FIRST))
    assert caught.value.reason == Reason.CHAT_TEMPLATE_MISSING
    assert (
        "no arm's model says one for the tokenizer of alien: those that do are not known to have it (first); give it a "
        "chat_template" in caught.value.message
    )


def test_a_bases_own_template_says_nothing_to_a_model_on_another_base() -> None:
    own = Taught(template_date="2026-01-01", tokenizer_digest="t1")
    assert ask(contender("own", own), contender("zero", template=ARM_TEMPLATE_TAUGHT))["zero"]
    with pytest.raises(FailedPrecondition, match="arm zero wants"):
        ask(contender("own", own), contender("zero", template=ARM_TEMPLATE_TAUGHT, base="twin"))


def test_another_template_changes_no_tokens_before_plain_text_that_were_taught() -> None:
    """Of a model that was taught before they were kept, too: it is asked behind what its rendering wrote."""
    before = Taught(chat_template="first", template_date="2026-01-01")
    found = ask(contender("own", before, chat_template="mine"), contender("as", before), contender("zero"))
    assert {arm_id: asking.old_prefix for arm_id, asking in found.items()} == {
        "own": True,
        "as": True,
        "zero": False,
    }


def test_an_arm_cannot_want_what_nobody_was_taught() -> None:
    with pytest.raises(FailedPrecondition, match="arm zero wants the template that a tuned arm") as caught:
        ask(contender("zero", template=ARM_TEMPLATE_TAUGHT), contender("tuned"))
    assert caught.value.reason == Reason.CHAT_TEMPLATE_MISSING


def test_templates_of_all_arms_must_fit_one_message() -> None:
    large = Taught(chat_template="é" * (MAX_TEMPLATES_BYTES // 4))
    ask(contender("a", large), contender("b", large))
    with pytest.raises(
        InvalidArgument, match="must have at most 1048576 bytes together, got 1572864: 1572864 of"
    ):
        ask(contender("a", large), contender("b", large), contender("c", large))


def test_system_prompts_of_all_arms_fit_one_message_beside_their_templates() -> None:
    """Each is within its own limit, and stands in a task thrice."""
    prompt = "語" * MAX_SYSTEM_CHARACTERS
    many = [contender(f"arm-{number}") for number in range(16)]
    for arm, _ in many:
        arm.system_prompt = prompt
    assert 3 * 16 * len(prompt.encode()) > MAX_MESSAGE_BYTES
    with pytest.raises(InvalidArgument) as caught:
        ask(*many)
    assert caught.value.violations[0].field == "evaluation.arms"
    assert "got 1572864: 0 of templates and 1572864 of system_prompt; compare fewer" in caught.value.message
    rest = MAX_TEMPLATES_BYTES - 10 * len(prompt.encode())
    fitting = [contender("t", Taught(chat_template="x" * rest)), *many[:10]]
    asked = ask(*fitting).values()
    arms = [arm for arm, _ in fitting]
    task = EvaluateSpec(
        evaluation=draft(arms=arms),
        arms=[ArmModel(arm=arm, asking=asking) for arm, asking in zip(arms, asked, strict=True)],
    )
    assert task.ByteSize() < MAX_MESSAGE_BYTES
    fitting[0][1].taught.chat_template += "x"
    with pytest.raises(InvalidArgument, match="got 1048577: 65537 of templates and 983040 of system_prompt"):
        ask(*fitting)


def test_an_arm_says_one_thing_of_its_template() -> None:
    arms = [
        EvaluationArm(arm_id="a", model="m", chat_template="x", template=ARM_TEMPLATE_BASE),
        EvaluationArm(arm_id="b", model="m", chat_template="x" * (MAX_TEMPLATES_BYTES + 1)),
    ]
    with pytest.raises(InvalidArgument) as caught:
        check(resolved(draft(arms=arms)))
    assert {one.field for one in caught.value.violations} == {
        "evaluation.arms[0].template",
        "evaluation.arms[1].chat_template",
    }
    assert "must be unset beside chat_template, got BASE" in caught.value.message
