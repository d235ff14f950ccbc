"""Whom an evaluation may ask outside of Luthier: endpoints that judge, and reward services that grade."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from luthier.errors import FieldViolation, InvalidArgument, LuthierError
from luthier.grading.asked import remote_addresses
from luthier.v1.evaluation_pb2 import Evaluation
from luthier.work.judge_access import JudgeAccess
from luthier.work.rewards import RewardAddresses


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """What the operator allows.

    Attributes:
        judges: endpoints, and keys that they may be asked with.
        rewards: addresses of reward services.
    """

    judges: JudgeAccess
    rewards: RewardAddresses

    def require(self, evaluation: Evaluation) -> None:
        """Raise InvalidArgument that names every judge and grader that may not be asked, or not with its key."""
        violations: list[FieldViolation] = []
        for check in self._checks(evaluation):
            try:
                check()
            except LuthierError as error:
                violations.extend(error.violations)
        if violations:
            raise InvalidArgument.of_fields(*violations)

    def _checks(self, evaluation: Evaluation) -> Iterator[Callable[[], object]]:
        for index, judge in enumerate(evaluation.judges):
            if judge.HasField("endpoint"):
                yield partial(self.judges.require, judge.endpoint, f"evaluation.judges[{index}].endpoint")
        for index, grader in enumerate(evaluation.graders):
            for field, address in remote_addresses(grader, f"evaluation.graders[{index}]"):
                yield partial(self.rewards.require, address, field)


NOBODY = Access(judges=JudgeAccess((), ()), rewards=RewardAddresses(()))
