"""How a model is asked: as it was taught, as its base says, or on purpose in another way. Values only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import date
from enum import StrEnum

from luthier.errors import FailedPrecondition, FieldViolation, InvalidArgument, Reason

MAX_TEMPLATES_BYTES = 1 << 20
"""Most that the templates of all arms may have together: they travel in one message."""


class TemplateSource(StrEnum):
    """Whose chat template a model is asked with; see the enum of the API."""

    UNSPECIFIED = "UNSPECIFIED"
    BASE = "BASE"
    TAUGHT = "TAUGHT"
    ARM = "ARM"


class ArmTemplate(StrEnum):
    """Which template an arm is asked with that gives none; see the enum of the API."""

    UNSPECIFIED = "UNSPECIFIED"
    BASE = "BASE"
    TAUGHT = "TAUGHT"


@dataclass(frozen=True, slots=True, kw_only=True)
class Taught:
    """How a tuned model was taught; see the Taught message of the API.

    `prefix_token_ids` None: not known, its rendering is of before they were kept.
    """

    chat_template: str
    template_date: str
    prefix_token_ids: tuple[int, ...] | None
    stop_token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Asking:
    """How a model is asked; see the Asking message of the worker protocol. Empty template: the base's own.

    `prefix_token_ids` None: those that the tokenizer says, or with `old_prefix` as renderings had them that did not
    keep theirs. `eos_token_ids` are those of the base model's resource.
    """

    source: TemplateSource = TemplateSource.BASE
    chat_template: str = ""
    template_date: str = ""
    prefix_token_ids: tuple[int, ...] | None = None
    stop_token_ids: tuple[int, ...] = ()
    eos_token_ids: tuple[int, ...] = ()
    old_prefix: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """What the base model of all arms says of itself, and the day on which it is asked."""

    has_chat_template: bool
    eos_token_ids: tuple[int, ...]
    today: date


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """What decides how an arm is asked: its wishes, and how its model was taught (None: not at all, or not known)."""

    arm_id: str
    chat_template: str
    template: ArmTemplate
    taught: Taught | None


def as_taught(taught: Taught | None, base: Base) -> Asking:
    """Return how a model is asked that was taught so; None: as its base says, today."""
    if taught is None:
        return Asking(template_date=base.today.isoformat(), eos_token_ids=base.eos_token_ids)
    return Asking(
        source=TemplateSource.TAUGHT,
        chat_template=taught.chat_template,
        template_date=taught.template_date,
        prefix_token_ids=taught.prefix_token_ids,
        stop_token_ids=taught.stop_token_ids,
        eos_token_ids=base.eos_token_ids,
        old_prefix=taught.prefix_token_ids is None,
    )


def askings(contenders: tuple[Contender, ...], base: Base) -> dict[str, Asking]:
    """Return how each arm of an evaluation is asked, by its id.

    Raises:
        FailedPrecondition: CHAT_TEMPLATE_MISSING, an arm wants what a tuned arm was taught and none says it.
        InvalidArgument: their templates are too large together.
    """
    taught = [one.taught for one in contenders if one.taught is not None]
    first = next((one for one in taught if one.chat_template), None)
    if first is None and base.has_chat_template:
        first = next(iter(taught), None)
    found = {one.arm_id: _asking(one, first, base) for one in contenders}
    size_bytes = sum(len(asking.chat_template.encode()) for asking in found.values())
    if size_bytes > MAX_TEMPLATES_BYTES:
        description = (
            f"the templates that all arms are asked with must have at most {MAX_TEMPLATES_BYTES} bytes together, got "
            f"{size_bytes}; compare fewer arms at a time"
        )
        raise InvalidArgument.of_fields(FieldViolation(field="evaluation.arms", description=description))
    return found


def _asking(one: Contender, first: Taught | None, base: Base) -> Asking:
    own = as_taught(one.taught, base)
    if one.chat_template:
        return replace(own, source=TemplateSource.ARM, chat_template=one.chat_template)
    match one.template:
        case ArmTemplate.BASE:
            return as_taught(None, base)
        case ArmTemplate.TAUGHT if first is None:
            raise FailedPrecondition(
                f"arm {one.arm_id} wants the template that a tuned arm was taught with, and no arm's model says one",
                reason=Reason.CHAT_TEMPLATE_MISSING,
                metadata={"arm_id": one.arm_id},
            )
        case ArmTemplate.TAUGHT:
            return as_taught(first, base)
        case ArmTemplate.UNSPECIFIED:
            lacks = one.taught is None and not base.has_chat_template
            return as_taught(first, base) if lacks else own


def arm_violations(index: int, chat_template: str, template: ArmTemplate) -> Iterator[FieldViolation]:
    """Yield what is wrong with an arm's wishes by themselves."""
    path = f"evaluation.arms[{index}]"
    size_bytes = len(chat_template.encode())
    if size_bytes > MAX_TEMPLATES_BYTES:
        description = f"must have at most {MAX_TEMPLATES_BYTES} bytes, got {size_bytes}"
        yield FieldViolation(field=f"{path}.chat_template", description=description)
    if chat_template and template is not ArmTemplate.UNSPECIFIED:
        description = f"must be unset beside chat_template, got {template}"
        yield FieldViolation(field=f"{path}.template", description=description)
