"""Which template each arm is asked with, and that the choice is written down."""

from __future__ import annotations

from dataclasses import replace
from datetime import date

import pytest
from tests.evaluation.evaluations.test_service import draft

from luthier.errors import FailedPrecondition, InvalidArgument, Reason
from luthier.evaluation.asking import (
    MAX_TEMPLATES_BYTES,
    ArmTemplate,
    Asking,
    Base,
    Contender,
    Taught,
    TemplateSource,
    askings,
)
from luthier.evaluation.evaluations.convert import asking_to_proto
from luthier.evaluation.evaluations.domain import Arm, check_evaluation

TODAY = date(2026, 11, 28)
EOS = (9, 11)
FIRST = Taught(chat_template="first", template_date="2026-01-01", prefix_token_ids=(1,), stop_token_ids=(2,))
SECOND = Taught(chat_template="second", template_date="2026-02-02", prefix_token_ids=(), stop_token_ids=(3,))


def contender(arm_id: str, taught: Taught | None = None, **wishes: object) -> Contender:
    wanted = {"chat_template": "", "template": ArmTemplate.UNSPECIFIED, **wishes}
    return Contender(arm_id=arm_id, taught=taught, **wanted)  # type: ignore[arg-type]


def ask(*contenders: Contender, base_has_template: bool = True) -> dict[str, Asking]:
    base = Base(has_chat_template=base_has_template, eos_token_ids=EOS, today=TODAY)
    return askings(contenders, base)


def test_tuned_arms_are_asked_as_each_was_taught_and_bases_as_themselves() -> None:
    found = ask(contender("zero"), contender("a", FIRST), contender("b", SECOND))
    assert found["zero"] == Asking(source=TemplateSource.BASE, template_date="2026-11-28", eos_token_ids=EOS)
    for arm_id, taught in (("a", FIRST), ("b", SECOND)):
        assert found[arm_id].source is TemplateSource.TAUGHT
        assert found[arm_id].chat_template == taught.chat_template
        assert found[arm_id].template_date == taught.template_date
        assert found[arm_id].prefix_token_ids == taught.prefix_token_ids
        assert found[arm_id].stop_token_ids == taught.stop_token_ids
        assert found[arm_id].eos_token_ids == EOS
        assert not found[arm_id].old_prefix


def test_a_base_without_a_template_is_asked_as_the_first_tuned_arm_was_taught_and_says_so() -> None:
    found = ask(contender("few"), contender("a", FIRST), contender("b", SECOND), base_has_template=False)
    assert (found["few"].source, found["few"].chat_template) == (TemplateSource.TAUGHT, "first")
    alone = ask(contender("few"), base_has_template=False)
    assert alone["few"].source is TemplateSource.BASE


def test_an_arm_can_name_another_template_on_purpose() -> None:
    found = ask(
        contender("own", FIRST, chat_template="mine"),
        contender("base", FIRST, template=ArmTemplate.BASE),
        contender("zero", template=ArmTemplate.TAUGHT),
    )
    assert found["own"] == Asking(
        source=TemplateSource.ARM,
        chat_template="mine",
        template_date="2026-01-01",
        prefix_token_ids=(1,),
        stop_token_ids=(2,),
        eos_token_ids=EOS,
    )
    assert found["base"] == Asking(source=TemplateSource.BASE, template_date="2026-11-28", eos_token_ids=EOS)
    assert (found["zero"].source, found["zero"].chat_template) == (TemplateSource.TAUGHT, "first")


def test_another_template_changes_no_tokens_before_plain_text_that_were_taught() -> None:
    """Of a model that was taught before they were kept, too: it is asked behind what its rendering wrote."""
    before = replace(FIRST, prefix_token_ids=None)
    found = ask(contender("own", before, chat_template="mine"), contender("as", before), contender("zero"))
    assert {arm_id: asking_to_proto(asking).old_prefix for arm_id, asking in found.items()} == {
        "own": True,
        "as": True,
        "zero": False,
    }


def test_an_arm_cannot_want_what_nobody_was_taught() -> None:
    with pytest.raises(FailedPrecondition, match="arm zero wants the template that a tuned arm") as caught:
        ask(contender("zero", template=ArmTemplate.TAUGHT), contender("tuned"))
    assert caught.value.reason == Reason.CHAT_TEMPLATE_MISSING


def test_templates_of_all_arms_must_fit_one_message() -> None:
    large = replace(FIRST, chat_template="é" * (MAX_TEMPLATES_BYTES // 4))
    ask(contender("a", large), contender("b", large))
    with pytest.raises(InvalidArgument, match="must have at most 1048576 bytes together, got 1572864"):
        ask(contender("a", large), contender("b", large), contender("c", large))


def test_an_arm_says_one_thing_of_its_template() -> None:
    arms = (
        Arm(arm_id="a", model="m", chat_template="x", template=ArmTemplate.BASE),
        Arm(arm_id="b", model="m", chat_template="x" * (MAX_TEMPLATES_BYTES + 1)),
    )
    with pytest.raises(InvalidArgument) as caught:
        check_evaluation(draft(arms=arms))
    assert [one.field for one in caught.value.violations] == [
        "evaluation.arms[0].template",
        "evaluation.arms[1].chat_template",
    ]
    assert "must be unset beside chat_template, got BASE" in caught.value.message
