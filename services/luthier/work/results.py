"""Results of tasks, as workers hand them in: what each kind may hold is a table of its family's rules.

Numbers and paths are looked at as in every message of the worker protocol (`work.validity`), unknown fields and enum
numbers as in every request (`runtime.door`).
"""

from __future__ import annotations

from collections.abc import Mapping

from luthier.errors import FieldViolation, Reason
from luthier.runtime.field_limits import LimitTable, limit_violations, refuse
from luthier.work.tasks import Task, TaskKind
from luthier.worker.v1 import task_pb2, worker_service_pb2

_ROOT = "result"


def check_result(
    request: worker_service_pb2.FinishTaskRequest, limits: Mapping[TaskKind, LimitTable]
) -> None:
    """Return if the request brings no result, or one within the limits of its kind.

    The result of a task that failed or was stopped is what is known all the same: it may be a part.

    Raises:
        InvalidArgument: names every field that is not, its value, and what would be right.
    """
    if not request.HasField("result"):
        return
    name = request.result.WhichOneof("result")
    kind = _kind(request.result)
    if name is None or kind is None or kind not in limits:
        known = ", ".join(sorted(one.lower() for one in limits))
        description = f"must be one of {known}, got {name or 'nothing'}"
        reason = Reason.INVALID_FIELD if name else Reason.FIELD_REQUIRED
        refuse([FieldViolation(field=_ROOT, description=description, reason=reason)])
        return
    is_part = request.cancelled or request.HasField("error")
    result = getattr(request.result, name)
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
