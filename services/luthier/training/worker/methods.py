"""The method of a job: its loss, as recipes know it, and the recipe that learns it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import assert_never

from luthier.training.recipes import grpo, preference, reward_model, sft, unpaired
from luthier.training.recipes.corpus import Corpus
from luthier.training.recipes.course import Course, Event, Warned
from luthier.training.recipes.engine import Engine
from luthier.training.recipes.loop import Settings
from luthier.training.recipes.objectives import (
    Dpo,
    Ipo,
    Kto,
    Orpo,
    PairwiseReward,
    Simpo,
    needs_reference,
)
from luthier.training.recipes.policy import Grpo
from luthier.training.recipes.rollouts import Rollouts
from luthier.v1.fine_tuning_job_pb2 import FineTuningJob, PreferenceConfig, ReinforcementConfig

Loss = Dpo | Ipo | Orpo | Simpo | Kto | PairwiseReward | Grpo
_Kind = PreferenceConfig.Loss


def loss_of(job: FineTuningJob) -> Loss | None:
    """Return what a job, all its defaults filled in, minimises; None: the loss of the answers themselves."""
    if job.HasField("reward_model"):
        return PairwiseReward(margin=job.reward_model.margin, centring=job.reward_model.centring)
    if job.HasField("reinforcement"):
        return _grpo(job.reinforcement)
    if not job.HasField("preference"):
        return None
    chosen = job.preference
    if chosen.loss == _Kind.LOSS_IPO:
        return Ipo(beta=chosen.beta, nll_weight=chosen.nll_weight)
    if chosen.loss == _Kind.LOSS_ORPO:
        return Orpo(beta=chosen.beta)
    if chosen.loss == _Kind.LOSS_SIMPO:
        return Simpo(beta=chosen.beta, gamma=chosen.gamma)
    if chosen.loss == _Kind.LOSS_KTO:
        return Kto(
            beta=chosen.beta,
            desirable_weight=chosen.desirable_weight,
            undesirable_weight=chosen.undesirable_weight,
        )
    return Dpo(beta=chosen.beta, label_smoothing=chosen.label_smoothing, nll_weight=chosen.nll_weight)


def _grpo(chosen: ReinforcementConfig) -> Grpo:
    is_constant = chosen.normaliser == ReinforcementConfig.NORMALISER_CONSTANT
    return Grpo(
        num_samples=chosen.num_samples,
        max_new_tokens=chosen.max_new_tokens,
        temperature=chosen.temperature,
        clip_low=chosen.clip_low,
        clip_high=chosen.clip_high,
        kl_weight=chosen.kl_weight,
        drop_truncated=chosen.drop_truncated,
        normaliser="CONSTANT" if is_constant else "TOKENS",
        scale_by_spread=chosen.scale_by_spread,
        max_grader_errors=chosen.max_grader_errors,
    )


def is_compared(loss: Loss | None) -> bool:
    """Whether a loss compares what it learns with the weights that the run began from."""
    if isinstance(loss, Grpo):
        return loss.kl_weight > 0
    return loss is not None and needs_reference(loss)


def steps_of(
    loss: Loss | None,
    engine: Engine,
    corpus: Corpus,
    settings: Settings,
    course: Course,
    check: Callable[[], None],
    rollouts: Rollouts | None = None,
) -> Iterator[Event | Warned]:
    """Run the recipe of a loss, reinforcement with what grades and keeps its answers. Raises as it does."""
    match loss:
        case None:
            return sft.train(engine, corpus, settings, course, check)
        case Dpo() | Ipo() | Orpo() | Simpo():
            return preference.train(engine, corpus, settings, loss, course, check)
        case Kto():
            return unpaired.train(engine, corpus, settings, loss, course, check)
        case PairwiseReward():
            return reward_model.train(engine, corpus, settings, loss, course, check)
        case Grpo():
            assert rollouts is not None, "what is drawn is graded and kept"
            return grpo.train(engine, corpus, settings, loss, rollouts, course, check)
        case _:
            assert_never(loss)
