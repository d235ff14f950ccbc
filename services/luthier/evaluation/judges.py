"""The reward model of an evaluation: what it may be, and what its worker is told of it."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date

from luthier.errors import FieldViolation, InvalidArgument, Reason
from luthier.evaluation.asking import as_taught
from luthier.evaluation.bases import base_name
from luthier.v1.evaluation_pb2 import Evaluation
from luthier.v1.model_pb2 import Model
from luthier.worker.v1.task_pb2 import ModelReference, RewardModel


def require_reward(model: Model) -> None:
    """Raise InvalidArgument REWARD_MODEL_EXPECTED for a model of another kind."""
    if model.kind == Model.KIND_REWARD:
        return
    kind = Model.Kind.Name(model.kind).removeprefix("KIND_")
    raise InvalidArgument.of_fields(
        FieldViolation(
            field="evaluation.reward_model",
            description=f"must be a reward model (kind REWARD) or a checkpoint of one, got {model.name!r}, of kind "
            f"{kind}; a job of method reward_model makes one",
            reason=Reason.REWARD_MODEL_EXPECTED,
        )
    )


def pin_judge(evaluation: Evaluation, models: Mapping[str, Model], today: date) -> RewardModel:
    """Say, in place, which very reward model an evaluation has, and return what its worker is told of it.

    `models` has it and its base model by name.
    """
    model = models[evaluation.reward_model]
    base = models[base_name(model)]
    known = {one.name for one in evaluation.references}
    for one in {each.name: each for each in (model, base)}.values():
        evaluation.model_digests[one.name] = one.digest
        if one.name not in known:
            evaluation.references.add(name=one.name, uid=one.uid, digest=one.digest)
    told = RewardModel(
        base_model=ModelReference(name=base.name, digest=base.digest),
        asking=as_taught(model, base, today),
        base_precision=model.base_precision,
    )
    if model.base_model:
        told.adapter.CopyFrom(ModelReference(name=model.name, digest=model.digest))
    return told
