"""What reinforcement learns from answers that were drawn and rewarded (GRPO): a clipped policy gradient.

Shape suffixes: N named tokens.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from luthier.lm.packed import PackedBatch
from luthier.lm.readouts import TokenScores
from luthier.training.recipes.engine import Objective, Sum
from luthier.training.recipes.objectives import REFERENCE, serial_sum

ADVANTAGE = "advantage"
"""Name of the stream with the advantage of each learnt token's answer."""
SAMPLER = "sampler_logprob"
"""Name of the stream with the log-probability that each learnt token was drawn with."""

_LEAST_SPREAD = 1e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class Grpo:
    """-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) + kl_weight r k of each token (arXiv:2402.03300).

    r is the ratio of a token's probability to that which it was drawn with, A the advantage of its answer, k the
    estimate exp(d) - d - 1 of the divergence from the start, d the log-ratio of the start to now. k is taken r times,
    as TRL does, since its gradient is that of the divergence then (arXiv:2512.02556). Bounds that differ are of
    arXiv:2503.14476, and so is a sum over all tokens of a step; advantages that are not divided by the spread, and
    answers that all have the same divisor, are of arXiv:2503.20783.

    Attributes:
        num_samples: answers to each prompt, which are compared with one another.
        max_new_tokens: longest answer.
        temperature: that answers are drawn at and learnt at.
        clip_low: how far below 1 a ratio counts.
        clip_high: how far above 1 a ratio counts.
        kl_weight: 0: no term for the divergence, and no pass for it.
        drop_truncated: whether answers that were cut at max_new_tokens teach nothing.
        normaliser: TOKENS: a sum is divided by the tokens of the step's answers that have a reward and are not dropped;
            CONSTANT: by the number of all its answers times max_new_tokens.
        scale_by_spread: whether advantages are divided by the standard deviation of their group's rewards.
        max_grader_errors: answers without a score, in all steps, at which a run fails.
    """

    num_samples: int
    max_new_tokens: int
    temperature: float
    clip_low: float
    clip_high: float
    kl_weight: float
    drop_truncated: bool
    normaliser: Literal["TOKENS", "CONSTANT"]
    scale_by_spread: bool
    max_grader_errors: int


def advantages(rewards: Sequence[float | None], *, scale_by_spread: bool) -> list[float]:
    """Return how much better than the mean of its group each answer was; 0 for one without a reward.

    All are exactly 0 where no two rewards differ. The spread is that of a sample, with 1e-4 added, as in TRL.
    """
    known = [reward for reward in rewards if reward is not None]
    if not has_spread(rewards):
        return [0.0] * len(rewards)
    mean = statistics.fmean(known)
    divisor = statistics.stdev(known) + _LEAST_SPREAD if scale_by_spread else 1.0
    return [0.0 if reward is None else (reward - mean) / divisor for reward in rewards]


def has_spread(rewards: Sequence[float | None]) -> bool:
    """Whether two rewards of a group differ: without that nothing can be learnt from it."""
    return len({reward for reward in rewards if reward is not None}) > 1


def policy_objective(
    loss: Grpo, counts: Mapping[str, float], see_gap: Callable[[float], None] = lambda _: None
) -> Objective[TokenScores]:
    """What a step minimises and measures, with scores at the temperature of the draw; `counts`: of `policy_counts`.

    `see_gap` is told the largest difference of any token's log-probability from that which it was drawn with, once for
    each batch.
    """

    def objective(scores: TokenScores, batch: PackedBatch) -> dict[str, Sum]:
        places_N = scores.position + 1
        advantage_N = batch.streams[ADVANTAGE][places_N]
        moved_N = scores.logprob - batch.streams[SAMPLER][places_N]
        ratio_N = moved_N.exp()
        kept_N = ratio_N.clamp(1 - loss.clip_low, 1 + loss.clip_high)
        loss_N = -torch.minimum(ratio_N * advantage_N, kept_N * advantage_N)
        gap_N, is_clipped_N = moved_N.detach().abs(), kept_N * advantage_N < ratio_N * advantage_N
        see_gap(gap_N.max().item())
        sums = {
            "sampler_trainer_gap": serial_sum(gap_N),
            "clip_share": is_clipped_N.sum(),
        }
        if loss.kl_weight:
            behind_N = batch.streams[REFERENCE][places_N] - scores.logprob
            kl_N = ratio_N * (behind_N.exp() - behind_N - 1)
            loss_N = loss_N + loss.kl_weight * kl_N
            sums["kl"] = serial_sum(kl_N.detach())
        assert scores.entropy is not None, "the readout is asked for entropies"
        sums["entropy"] = serial_sum(scores.entropy.detach())
        sums["train_loss"] = serial_sum(loss_N)
        return {name: Sum(total, counts[name]) for name, total in sums.items()}

    return objective


def policy_counts(loss: Grpo, num_tokens: int, divisor: float) -> dict[str, float]:
    """Return what divides each sum of a step: the tokens that pass through the update, and `divisor` the loss."""
    names = ("entropy", "clip_share", "sampler_trainer_gap", *(("kl",) if loss.kl_weight else ()))
    return {**dict.fromkeys(names, float(num_tokens)), "train_loss": divisor}
