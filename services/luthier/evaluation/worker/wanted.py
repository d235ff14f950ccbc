"""What a task of an evaluation wants: all of it and its outcome, or the answers of a share alone."""

from __future__ import annotations

from luthier.evaluation.shares import all_rows, rows_of
from luthier.worker.v1 import task_pb2


def spec_of(task: task_pb2.Task) -> task_pb2.EvaluateSpec:
    """Return the specification of an evaluation that a task is of, whatever it wants of it."""
    return task.answer_share if task.HasField("answer_share") else task.evaluate


class Wanted:
    """Which answers a task wants.

    Args:
        spec: its specification.
        num_records: records that every arm is asked.
    """

    def __init__(self, spec: task_pb2.EvaluateSpec, num_records: int) -> None:
        self._all_arms_base = spec.base_model
        self._share = spec.share if spec.HasField("share") else None
        self._num_records = num_records
        self._num_more = 0
        self.arms = [arm for arm in spec.arms if self.rows(arm.arm.arm_id)]

    @property
    def is_share(self) -> bool:
        """Whether it is a share, of which nobody wants an outcome."""
        return self._share is not None

    @property
    def num_answers(self) -> int:
        """How many answers it wants."""
        return sum(len(self.rows(arm.arm.arm_id)) for arm in self.arms)

    @property
    def num_all(self) -> int:
        """How many answers it will have at most, with all that is asked besides."""
        return self.num_answers + self._num_more

    def expect(self, num_more: int) -> None:
        """Count answers in that are asked for besides those of arms to records."""
        self._num_more += num_more

    @property
    def records(self) -> range:
        """The records from the first to the last of which an arm is asked."""
        return range(self._num_records) if self._share is None else all_rows(self._share)

    def base(self, arm: task_pb2.ArmModel) -> task_pb2.ModelReference:
        """Return the base model of an arm."""
        return arm.base_model if arm.HasField("base_model") else self._all_arms_base

    def base_of(self, arm: task_pb2.ArmModel) -> str:
        """Return what arms on the same weights share."""
        return self.base(arm).digest

    def rows(self, arm_id: str) -> range:
        """Return which records an arm is asked."""
        return range(self._num_records) if self._share is None else rows_of(self._share, arm_id)
