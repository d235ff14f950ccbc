"""What evaluations and generations build on must be READY."""

from __future__ import annotations

from luthier.errors import FailedPrecondition, FieldViolation, InvalidArgument, Reason
from luthier.v1.dataset_pb2 import DatasetVersion
from luthier.v1.model_pb2 import Model


def require_ready(found: DatasetVersion | Model) -> None:
    """Raise FailedPrecondition WRONG_STATE unless a version or a model is READY."""
    if found.state == found.STATE_READY:
        return
    state = found.State.DESCRIPTOR.values_by_number[found.state].name.removeprefix("STATE_")
    raise FailedPrecondition(
        f"{found.name} must be READY, it is {state}",
        reason=Reason.WRONG_STATE,
        metadata={"name": found.name, "state": state},
    )


def require_askable(model: Model, field: str) -> None:
    """Raise InvalidArgument, naming the field, for a model that gives no words."""
    if model.kind == Model.KIND_REWARD:
        description = f"must be a model of words, got {model.name!r}, a reward model: it values answers"
        raise InvalidArgument.of_fields(FieldViolation(field=field, description=description))
    if model.kind == Model.KIND_EXPORT:
        description = (
            f"must be a model of words, got {model.name!r}, a file for other programs; it was made from "
        )
        violation = FieldViolation(field=field, description=f"{description}{model.start_from}")
        raise InvalidArgument.of_fields(violation)
