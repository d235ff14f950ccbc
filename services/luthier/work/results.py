"""Results of tasks, as workers hand them in: what each kind may hold is a table of its family's rules.

Numbers and paths are looked at as in every message of the worker protocol (`work.validity`), unknown fields and enum
numbers as in every request (`runtime.door`).
"""

from __future__ import annotations

from collections.abc import Mapping

from luthier.errors import FieldViolation, Reason
from luthier.runtime.field_limits import (
    ANY,
    REQUIRED,
    Limit,
    LimitTable,
    count,
    demanded,
    limit_violations,
    refuse,
    under,
    whole,
)
from luthier.runtime.result_limits import FILE
from luthier.work.tasks import Outcome, Task, TaskKind
from luthier.worker.v1 import task_pb2, worker_service_pb2

_ROOT = "result"


MAX_FILES = 1000
MAX_METRICS = 10_000
MAX_METRIC_NAME = 200
_METRIC_NAME = Limit(
    rule=f"must have names of 1 to {MAX_METRIC_NAME} characters",
    allows=lambda metrics: all(0 < len(name) <= MAX_METRIC_NAME for name in metrics),
    shown=lambda metrics: f"one of {max(map(len, metrics))}" if all(metrics) else "an empty one",
)
CHECKPOINT_LIMITS: LimitTable = {
    "task": ANY,
    "epoch": ANY,
    "step": Limit(rule="must not be negative", allows=lambda step: step >= 0),
    "files": count(MAX_FILES, "files", least=1),
    **under("files[]", FILE),
    "metrics": (count(MAX_METRICS, "metrics"), _METRIC_NAME),
    "seconds": Limit(rule="must not be negative", allows=lambda seconds: seconds >= 0),
}
"""What a worker may say of a checkpoint, whatever kind of task it is of."""
MAX_ROLLOUTS = 1 << 20
ROLLOUTS_LIMITS: LimitTable = {
    "task": ANY,
    "epoch": ANY,
    "step": demanded(Limit(rule="must be at least 1", allows=lambda step: step >= 1)),
    "file": REQUIRED,
    **under("file", FILE),
    "num_rollouts": demanded(whole(1, MAX_ROLLOUTS)),
}
"""What a worker may say of the rollouts of a step."""


def check_checkpoint(request: worker_service_pb2.CommitCheckpointRequest) -> None:
    """Raise InvalidArgument that names every field of a checkpoint that is beyond its limit."""
    refuse(limit_violations(request, CHECKPOINT_LIMITS))


def check_rollouts(request: worker_service_pb2.CommitRolloutsRequest) -> None:
    """Raise InvalidArgument that names every field of rollouts that is beyond its limit."""
    refuse(limit_violations(request, ROLLOUTS_LIMITS))


def check_result(outcome: Outcome, limits: Mapping[TaskKind, LimitTable]) -> None:
    """Return if an outcome brings no result, or one within the limits of its kind.

    The result of a task that failed or was stopped is what is known all the same: it may be a part.

    Raises:
        InvalidArgument: names every field that is not, its value, and what would be right.
    """
    if outcome.result is None:
        return
    name = outcome.result.WhichOneof("result")
    kind = _kind(outcome.result)
    if name is None or kind is None or kind not in limits:
        known = ", ".join(sorted(one.lower() for one in limits))
        description = f"must be one of {known}, got {name or 'nothing'}"
        reason = Reason.INVALID_FIELD if name else Reason.FIELD_REQUIRED
        refuse([FieldViolation(field=_ROOT, description=description, reason=reason)])
        return
    is_part = outcome.cancelled or outcome.failure is not None
    result = getattr(outcome.result, name)
    refuse(limit_violations(result, limits[kind], f"{_ROOT}.{name}", is_part=is_part))


def require_kind(task: Task, result: task_pb2.TaskResult) -> None:
    """Raise InvalidArgument unless a result is of its task's kind."""
    if _kind(result) is not task.kind:
        got = result.WhichOneof("result") or "nothing"
        description = f"must be {task.kind.lower()}, as its task is, got {got}"
        refuse([FieldViolation(field=_ROOT, description=description)])


def _kind(result: task_pb2.TaskResult) -> TaskKind | None:
    name = result.WhichOneof("result")
    return None if name is None else TaskKind(name.upper())
