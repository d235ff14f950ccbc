"""What a base model is held in while it and its adapters are asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from luthier.errors import FieldViolation, InvalidArgument
from luthier.evaluation.bases import bases_of
from luthier.lm.precision import PRECISIONS, Precision
from luthier.v1.base_precision_pb2 import BASE_PRECISION_BFLOAT16, BasePrecision
from luthier.v1.evaluation_pb2 import EvaluationArm
from luthier.v1.model_pb2 import Model


def precision_of(chosen: BasePrecision.ValueType) -> Precision:
    """Return what a base model is held in; what is not said is BFLOAT16."""
    name = BasePrecision.Name(chosen)
    return next((one for one in PRECISIONS if name.endswith(f"_{one}")), "BFLOAT16")


def asked_in(said: BasePrecision.ValueType, model: Model) -> BasePrecision.ValueType:
    """Return what the base of a model is held in when it is asked: what is said, else what it was trained beside."""
    return said or model.base_precision or BASE_PRECISION_BFLOAT16


def shared_precision(
    said: BasePrecision.ValueType, arms: Sequence[EvaluationArm], models: Mapping[str, Model]
) -> BasePrecision.ValueType:
    """Return what the base of all arms is held in: what is said, else what their adapters were trained beside.

    Raises InvalidArgument when nothing is said and they were not trained beside the same, or not beside BFLOAT16 and
    other arms stand on other base models.
    """
    tuned = {arm.arm_id: models[arm.model] for arm in arms if models[arm.model].base_model}
    found = {asked_in(said, model): arm_id for arm_id, model in tuned.items()}
    if len(found) > 1:
        shown = ", ".join(f"{arm_id}: {precision_of(one)}" for one, arm_id in found.items())
        description = (
            "must be set, as the arms' adapters were trained beside a base model that was held in different ways, and "
            f"all arms are asked beside one; got {shown}"
        )
        raise InvalidArgument.of_fields(
            FieldViolation(field="evaluation.base_precision", description=description)
        )
    chosen = next(iter(found), said or BASE_PRECISION_BFLOAT16)
    if not said and chosen != BASE_PRECISION_BFLOAT16 and len(bases_of(arms, models)) > 1:
        shown = f"{found[chosen]}: {precision_of(chosen)}"
        description = (
            "must be set, as arms stand on several base models, all of which are held alike, and an adapter was "
            f"trained beside one that was held in another way than BFLOAT16; got {shown}"
        )
        raise InvalidArgument.of_fields(
            FieldViolation(field="evaluation.base_precision", description=description)
        )
    return chosen
