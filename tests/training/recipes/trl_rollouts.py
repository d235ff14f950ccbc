"""Answers that were drawn and rewarded, on which our policy gradient and TRL's GRPO trainer are compared."""

from __future__ import annotations

from dataclasses import dataclass, replace

from luthier.lm.generate import FinishReason
from luthier.training.recipes.policy import Grpo, advantages
from luthier.training.recipes.rollouts import Reward, Rollout

PLAIN = Grpo(
    num_samples=3,
    max_new_tokens=8,
    temperature=1.0,
    clip_low=0.2,
    clip_high=0.28,
    kl_weight=0.0,
    drop_truncated=False,
    normaliser="TOKENS",
    scale_by_spread=False,
    max_grader_errors=64,
)
LOSSES: dict[str, Grpo] = {
    "grpo_tokens": PLAIN,
    "grpo_constant": replace(PLAIN, normaliser="CONSTANT", clip_low=0.1, clip_high=0.1),
    "grpo_kl": replace(PLAIN, kl_weight=0.3),
    "grpo_spread": replace(PLAIN, scale_by_spread=True, temperature=0.8),
    "grpo_all": replace(
        PLAIN,
        kl_weight=0.2,
        normaliser="CONSTANT",
        scale_by_spread=True,
        drop_truncated=True,
        temperature=1.3,
    ),
}


@dataclass(frozen=True)
class _Drawn:
    """An answer, what its tokens were drawn with, and its reward."""

    token_ids: list[int]
    logprobs: list[float]
    reward: float


PROMPTS: list[tuple[list[int], list[_Drawn]]] = [
    (
        [5, 9, 11],
        [
            _Drawn([30, 31, 32, 2], [-3.7, -5.5, -4.7, -4.3], 1.0),
            _Drawn([44, 51], [-4.6, -4.3], 0.0),
            _Drawn([33, 30, 36, 60, 61], [-5.1, -4.2, -5.0, -5.2, -5.1], 0.25),
        ],
    ),
    (
        [8, 7, 12, 19, 4],
        [
            _Drawn([62, 63, 64], [-4.6, -5.3, -5.5], 0.0),
            _Drawn([31, 35, 31, 36, 37, 2], [-5.2, -4.2, -3.1, -4.5, -5.9, -3.7], 1.0),
            _Drawn([70, 2], [-4.7, -4.9], 0.5),
        ],
    ),
]
"""Answers without an end (2) were cut: two to the first prompt, and one to the second."""


def rollouts_of(loss: Grpo) -> list[Rollout]:
    """All answers with the advantages that they have under a loss."""
    made = []
    for group, (prompt, drawn) in enumerate(PROMPTS):
        weights = advantages([one.reward for one in drawn], scale_by_spread=loss.scale_by_spread)
        for sample, (one, advantage) in enumerate(zip(drawn, weights, strict=True)):
            is_cut = one.token_ids[-1] != 2
            made.append(
                Rollout(
                    group=group,
                    sample=sample,
                    row=group,
                    prompt=tuple(prompt),
                    token_ids=tuple(one.token_ids),
                    logprobs=tuple(one.logprobs),
                    finish_reason=FinishReason.LENGTH if is_cut else FinishReason.STOP,
                    reward=Reward(score=one.reward),
                    advantage=0.0 if is_cut and loss.drop_truncated else advantage,
                )
            )
    return made
