"""In words, what stands below an arm, its examples, and with which chat template it was asked."""

from __future__ import annotations

from luthier.v1.evaluation_pb2 import (
    SHOT_CHOICE_SIMILAR,
    TEMPLATE_SOURCE_ARM,
    TEMPLATE_SOURCE_BASE,
    TEMPLATE_SOURCE_TAUGHT,
    ArmResult,
    Evaluation,
    EvaluationArm,
)

_DIGEST_CHARACTERS = 8
_WORDS = {
    TEMPLATE_SOURCE_BASE: "the base model's template",
    TEMPLATE_SOURCE_TAUGHT: "the template that was taught",
    TEMPLATE_SOURCE_ARM: "the arm's template",
}


def bases_below(evaluation: Evaluation) -> dict[str, str]:
    """Return the base model of each arm by its id, where an evaluation's arms stand on several; else nothing."""
    found = {arm.arm_id: arm.base_model for arm in evaluation.arms}
    return found if len(set(found.values())) > 1 else {}


def asked_with(result: ArmResult) -> str:
    """Return e.g. `the template that was taught (1a2b3c4d, 2026-11-28)`; empty when the service does not say."""
    if result.template_source not in _WORDS:
        return ""
    if not result.template_digest:
        return "no template"
    digest = result.template_digest[:_DIGEST_CHARACTERS]
    return f"{_WORDS[result.template_source]} ({digest}, {result.template_date})"


def system_prompts(evaluation: Evaluation) -> dict[str, str]:
    """Return the system prompt of each arm that has one of its own, by its id."""
    return {arm.arm_id: arm.system_prompt for arm in evaluation.arms if arm.system_prompt}


def shots_words(arm: EvaluationArm) -> str:
    """Return how many examples an arm is given, e.g. `3` of the same for all, or `3:similar`."""
    return f"{arm.num_shots}{':similar' * (arm.shot_choice == SHOT_CHOICE_SIMILAR)}"
