"""How a model is asked: as it was taught, as its base says, or on purpose in another way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date

from luthier.errors import FailedPrecondition, FieldViolation, InvalidArgument, Reason
from luthier.evaluation.bases import base_name, has_tokens_of
from luthier.v1.evaluation_pb2 import (
    ARM_TEMPLATE_BASE,
    ARM_TEMPLATE_TAUGHT,
    TEMPLATE_SOURCE_ARM,
    TEMPLATE_SOURCE_BASE,
    TEMPLATE_SOURCE_TAUGHT,
    EvaluationArm,
)
from luthier.v1.model_pb2 import Model
from luthier.worker.v1.task_pb2 import Asking, PrefixTokens

MAX_TEMPLATES_BYTES = 1 << 20
"""Most that the templates and system prompts of all arms may have together: they travel in one message, thrice."""


def as_base(base: Model, today: date) -> Asking:
    """Return how a base model is asked: as it says itself, today."""
    return Asking(
        template_source=TEMPLATE_SOURCE_BASE,
        template_date=today.isoformat(),
        eos_token_ids=base.eos_token_ids,
    )


def as_taught(model: Model, base: Model, today: date) -> Asking:
    """Return how a model is asked: as it was taught, or as its base says where that is not known."""
    if not model.HasField("taught"):
        return as_base(base, today)
    taught = model.taught
    # What was taught before these tokens were kept says none of them.
    known = bool(taught.stop_token_ids or taught.prefix_token_ids)
    return Asking(
        template_source=TEMPLATE_SOURCE_TAUGHT,
        chat_template=taught.chat_template,
        template_date=taught.template_date,
        prefix=PrefixTokens(token_ids=taught.prefix_token_ids) if known else None,
        stop_token_ids=taught.stop_token_ids,
        eos_token_ids=base.eos_token_ids,
        old_prefix=not known,
    )


def askings(arms: Sequence[EvaluationArm], models: Mapping[str, Model], today: date) -> list[Asking]:
    """Return how each arm of an evaluation is asked; `models` has the arms' models, and those below them, by name.

    Raises:
        FailedPrecondition: CHAT_TEMPLATE_MISSING, an arm wants what a tuned arm was taught and none says it in tokens
            that the arm has.
        InvalidArgument: their templates and system prompts are too large together.
    """
    taught = [models[arm.model] for arm in arms if models[arm.model].HasField("taught")]
    found = [_asking(arm, models, taught, today) for arm in arms]
    for arm, asking in zip(arms, found, strict=True):
        asking.system_prompt = arm.system_prompt
    _require_one_message(found)
    return found


def _require_one_message(found: Sequence[Asking]) -> None:
    of_templates = sum(len(asking.chat_template.encode()) for asking in found)
    of_prompts = sum(len(asking.system_prompt.encode()) for asking in found)
    if of_templates + of_prompts > MAX_TEMPLATES_BYTES:
        description = (
            f"the templates and system prompts that all arms are asked with must have at most {MAX_TEMPLATES_BYTES} "
            f"bytes together, got {of_templates + of_prompts}: {of_templates} of templates and {of_prompts} of "
            "system_prompt; compare fewer arms at a time"
        )
        raise InvalidArgument.of_fields(FieldViolation(field="evaluation.arms", description=description))


def _asking(arm: EvaluationArm, models: Mapping[str, Model], taught: Sequence[Model], today: date) -> Asking:
    """`taught` are the tuned models that say how they were taught."""
    model = models[arm.model]
    base = models[base_name(model)]
    own = as_taught(model, base, today)
    if arm.chat_template:
        own.template_source = TEMPLATE_SOURCE_ARM
        own.chat_template = arm.chat_template
        return own
    if arm.template == ARM_TEMPLATE_BASE:
        return as_base(base, today)
    first = _first_taught(model, models, taught)
    if arm.template == ARM_TEMPLATE_TAUGHT and first is None:
        others = ", ".join(one.name for one in taught)
        why = (
            f"those that do are not known to have it ({others}); give it a chat_template"
            if taught
            else "none does"
        )
        raise FailedPrecondition(
            f"arm {arm.arm_id} wants the template that a tuned arm was taught with, and no arm's model says one for "
            f"the tokenizer of {base.name}: {why}",
            reason=Reason.CHAT_TEMPLATE_MISSING,
            metadata={"arm_id": arm.arm_id},
        )
    lacks = not model.HasField("taught") and not base.has_chat_template
    if first is not None and (arm.template == ARM_TEMPLATE_TAUGHT or lacks):
        return as_taught(first, base, today)
    return own


def _first_taught(model: Model, models: Mapping[str, Model], taught: Sequence[Model]) -> Model | None:
    """Return the first tuned model whose way of being asked another model can take over; None: there is none.

    Tokens before and after an answer are kept as numbers, so that both must have one tokenizer. One that was taught
    with its base's own template says nothing to a model on another base.
    """
    base = models[base_name(model)]
    fitting = [one for one in taught if has_tokens_of(one, model, models)]
    first = next((one for one in fitting if one.taught.chat_template), None)
    if first is not None or not base.has_chat_template:
        return first
    return next((one for one in fitting if base_name(one) == base.name), None)
