"""Whether the judges of an evaluation may be asked where they say, with the keys that they say."""

from __future__ import annotations

from luthier.errors import FieldViolation, InvalidArgument, LuthierError
from luthier.v1.evaluation_pb2 import Evaluation
from luthier.work.judge_access import JudgeAccess


def require_endpoints(evaluation: Evaluation, access: JudgeAccess) -> None:
    """Raise InvalidArgument that names every endpoint that may not be asked, or not with its key."""
    violations: list[FieldViolation] = []
    for index, judge in enumerate(evaluation.judges):
        if judge.HasField("endpoint"):
            try:
                access.require(judge.endpoint, f"evaluation.judges[{index}].endpoint")
            except LuthierError as error:
                violations.extend(error.violations)
    if violations:
        raise InvalidArgument.of_fields(*violations)
