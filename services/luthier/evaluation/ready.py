"""What evaluations and generations build on must be READY."""

from __future__ import annotations

from luthier.errors import FailedPrecondition, Reason
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
