"""Reward models that value answers: what they may be, and what a worker is told of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import date
from typing import Protocol

from luthier.errors import FieldViolation, InvalidArgument
from luthier.evaluation.asking import as_taught
from luthier.evaluation.names import WEIGHTS
from luthier.evaluation.ready import require_ready
from luthier.grading.asked import require_reward_model, reward_model_names
from luthier.v1.evaluation_pb2 import Evaluation
from luthier.v1.grader_pb2 import Grader
from luthier.v1.model_pb2 import Model
from luthier.worker.v1.task_pb2 import ModelReference, RewardModel

MAX_REWARD_MODELS = 8
"""Of one evaluation, or of one grader that is tried: each is loaded in its turn."""


class Models(Protocol):
    """Where reward models are found."""

    async def model(self, name: str) -> Model:
        """Return a model; one that was tuned says how it was taught where anybody knows. Raises NotFound."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundReward:
    """A reward model, and the base model below its adapter, or itself."""

    model: Model
    base: Model

    def told(self, today: date) -> RewardModel:
        """Return what a worker is told of it."""
        told = RewardModel(
            base_model=ModelReference(name=self.base.name, digest=self.base.digest),
            asking=as_taught(self.model, self.base, today),
            base_precision=self.model.base_precision,
            context_length=self.base.context_length,
        )
        if self.model.base_model:
            told.adapter.CopyFrom(ModelReference(name=self.model.name, digest=self.model.digest))
        return told


def named_by(evaluation: Evaluation) -> Iterator[tuple[str, str]]:
    """Yield the reward models that an evaluation names, each after its field: its metric's, then its graders'."""
    if evaluation.reward_model:
        yield "evaluation.reward_model", evaluation.reward_model
    for index, grader in enumerate(evaluation.graders):
        yield from reward_model_names(grader, f"evaluation.graders[{index}]")


def named_by_grader(grader: Grader) -> Iterator[tuple[str, str]]:
    """Yield the reward models that a grader names which is tried alone, each after its field."""
    return reward_model_names(grader, "grader")


def check_names(named: Iterable[tuple[str, str]]) -> None:
    """Raise InvalidArgument unless all are models or checkpoints, `MAX_REWARD_MODELS` at most."""
    known: set[str] = set()
    for field, name in named:
        WEIGHTS.parse(name, field=field)
        known.add(name)
        if len(known) > MAX_REWARD_MODELS:
            description = (
                f"must be one of at most {MAX_REWARD_MODELS} reward models in all, got one more: {name!r}"
            )
            raise InvalidArgument.of_fields(FieldViolation(field=field, description=description))


async def find(models: Models, named: Iterable[tuple[str, str]]) -> dict[str, FoundReward]:
    """Return reward models by their names.

    Raises:
        NotFound: there is none of the name.
        InvalidArgument: REWARD_MODEL_EXPECTED, it is a model of another kind; it names the field.
        FailedPrecondition: WRONG_STATE, it or the model below it is not READY.
        Unavailable: the Training service is away.
    """
    found: dict[str, FoundReward] = {}
    for field, name in named:
        if name in found:
            continue
        model = await models.model(name)
        require_reward_model(model, field)
        base = await models.model(model.base_model) if model.base_model else model
        for one in (model, base):
            require_ready(one)
        found[name] = FoundReward(model=model, base=base)
    return found


def pin(evaluation: Evaluation, found: Iterable[FoundReward]) -> None:
    """Say, in place, which very reward models an evaluation has, and what stands below them."""
    for one in (each for reward in found for each in (reward.model, reward.base)):
        if one.name not in evaluation.model_digests:
            evaluation.model_digests[one.name] = one.digest
        if one.name not in {reference.name for reference in evaluation.references}:
            evaluation.references.add(name=one.name, uid=one.uid, digest=one.digest)
