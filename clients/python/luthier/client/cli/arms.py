"""The arms of an evaluation as they are typed: who contends, with which template, under which system prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from luthier.client.cli.drafts import Draft
from luthier.client.cli.session import Session

if TYPE_CHECKING:
    from luthier.v1.evaluation_pb2 import Evaluation, EvaluationArm


def pass_arms(function: Callable[..., None]) -> Callable[..., None]:
    """Put what `--arm`, `--template` and `--system-prompt` say into a command's draft, and pass the draft on."""

    @wraps(function)
    def command(
        session: Session,
        draft: Draft[Evaluation],
        /,
        *,
        arms: tuple[str, ...],
        templates: tuple[str, ...],
        system_prompts: tuple[str, ...],
        **own: Any,
    ) -> None:
        if arms:
            del draft.message.arms[:]
            draft.message.arms.extend(arm_of(text) for text in arms)
        _choose_templates(draft.message.arms, templates)
        _give_system_prompts(draft.message.arms, system_prompts)
        function(session, draft, **own)

    return command


def arm_of(text: str) -> EvaluationArm:
    """Return the arm that a word stands for. Raises BadParameter."""
    from luthier.v1.evaluation_pb2 import SHOT_CHOICE_SIMILAR, EvaluationArm

    arm_id, equals, contender = text.partition("=")
    model, colon, examples = contender.partition(":")
    shots, second, choice = examples.partition(":")
    is_right = equals and arm_id and model and (not colon or shots.isdecimal())
    if not is_right or (second and choice != "similar"):
        problem = f"must be ID=MODEL, ID=MODEL:SHOTS or ID=MODEL:SHOTS:similar, got {text!r}"
        raise click.BadParameter(problem, param_hint="--arm")
    arm = EvaluationArm(arm_id=arm_id, model=model, num_shots=int(shots or 0))
    if choice:
        arm.shot_choice = SHOT_CHOICE_SIMILAR
    return arm


def _choose_templates(arms: Iterable[EvaluationArm], templates: Iterable[str]) -> None:
    from luthier.v1.evaluation_pb2 import ARM_TEMPLATE_BASE, ARM_TEMPLATE_TAUGHT

    chosen = {"base": ARM_TEMPLATE_BASE, "taught": ARM_TEMPLATE_TAUGHT}
    for arm, template in _said_of(arms, templates, "--template", "ID=FILE, ID=base or ID=taught"):
        if template in chosen:
            arm.template = chosen[template]
            continue
        arm.chat_template = _read(template, "--template")


def _give_system_prompts(arms: Iterable[EvaluationArm], system_prompts: Iterable[str]) -> None:
    for arm, text in _said_of(arms, system_prompts, "--system-prompt", "ID=TEXT or ID=@FILE"):
        arm.system_prompt = _read(text[1:], "--system-prompt") if text.startswith("@") else text


def _said_of(
    arms: Iterable[EvaluationArm], words: Iterable[str], option: str, form: str
) -> Iterator[tuple[EvaluationArm, str]]:
    by_id = {arm.arm_id: arm for arm in arms}
    for word in words:
        arm_id, _, said = word.partition("=")
        if arm_id not in by_id or not said:
            known = ", ".join(by_id)
            raise click.BadParameter(f"must be {form} with an ID of {known}, got {word!r}", param_hint=option)
        yield by_id[arm_id], said


def _read(path: str, option: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise click.BadParameter(f"must be a file of text: {error}", param_hint=option) from error
