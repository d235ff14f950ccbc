"""The method of a job: its loss, as recipes know it, and the recipe that learns it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import assert_never

from luthier.training.recipes import preference, reward_model, sft, unpaired
from luthier.training.recipes.corpus import Corpus
from luthier.training.recipes.course import Course, Event
from luthier.training.recipes.engine import Engine
from luthier.training.recipes.loop import Settings
from luthier.training.recipes.objectives import Dpo, Ipo, Kto, Orpo, PairwiseReward, Simpo
from luthier.v1.fine_tuning_job_pb2 import FineTuningJob, PreferenceConfig

Loss = Dpo | Ipo | Orpo | Simpo | Kto | PairwiseReward
_Kind = PreferenceConfig.Loss


def loss_of(job: FineTuningJob) -> Loss | None:
    """Return what a job, all its defaults filled in, minimises; None: the loss of the answers themselves."""
    if job.HasField("reward_model"):
        return PairwiseReward(margin=job.reward_model.margin, centring=job.reward_model.centring)
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


def steps_of(
    loss: Loss | None,
    engine: Engine,
    corpus: Corpus,
    settings: Settings,
    course: Course,
    check: Callable[[], None],
) -> Iterator[Event]:
    """Run the recipe of a loss. Raises as it does."""
    match loss:
        case None:
            return sft.train(engine, corpus, settings, course, check)
        case Dpo() | Ipo() | Orpo() | Simpo():
            return preference.train(engine, corpus, settings, loss, course, check)
        case Kto():
            return unpaired.train(engine, corpus, settings, loss, course, check)
        case PairwiseReward():
            return reward_model.train(engine, corpus, settings, loss, course, check)
        case _:
            assert_never(loss)
