"""Samples graded in limited processes, one at a time: by the service that tries graders, and by evaluations.

Similarities of long texts take seconds of processor time, and regular expressions are of whoever calls.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from luthier.errors import Failure, Reason
from luthier.errors.status import failure_to_status, status_to_failure
from luthier.grading.outcomes import CODES
from luthier.v1.grader_pb2 import Grader, Sample, SampleGrade
from luthier.work.limited import Check
from luthier.work.limited_child import Limits
from luthier.work.limited_pool import LimitedPool
from luthier.work.rewards import RewardError

CHILD = "luthier.evaluation.grading.child"
SAMPLE_LIMITS = Limits(cpu_seconds=10, memory_bytes=1 << 30, wall_seconds=40.0)
"""What one sample may take. Sixteen similarities of the longest texts take some 7 s of processor time."""
Outcomes = Mapping[str, float | RewardError]
"""What reward services, or reward models, said of one sample, by the path of the grader."""


def grading_pool(size: int, wait_seconds: float) -> LimitedPool:
    """Return processes that grade, started when first needed; whoever waits for one does so for `wait_seconds`."""
    return LimitedPool(CHILD, SAMPLE_LIMITS, size=size, wait_seconds=wait_seconds)


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleGrader:
    """Grades samples by one grader, whose message has passed the checks.

    Attributes:
        pool: of processes that grade.
        key: whose samples they are, for turns at the pool.
        encoded: the grader, as the processes are told it.
    """

    pool: LimitedPool
    key: str
    encoded: str

    @staticmethod
    def of(pool: LimitedPool, key: str, grader: Grader) -> SampleGrader:
        """Return what grades by a grader."""
        # The order of a map's entries is not the same for ever, and the process knows graders by their text.
        encoded = base64.b64encode(grader.SerializeToString(deterministic=True)).decode()
        return SampleGrader(pool=pool, key=key, encoded=encoded)

    def grade(
        self, sample: Sample, remote: Outcomes, values: Outcomes, check: Check = lambda: None
    ) -> SampleGrade:
        """Return what the grader makes of a sample, given what reward services and reward models said of it.

        Raises:
            LimitReached: it takes more than `SAMPLE_LIMITS`.
            ProcessBroken: the process failed in a way that nobody foresaw.
            LuthierError: as `LimitedPool.call`.
        """
        request = {
            "grader": self.encoded,
            "item_json": sample.item_json,
            "output_text": sample.output_text,
            "remote": {path: _told(one) for path, one in remote.items()},
            "values": {path: _told(one) for path, one in values.items()},
        }
        return _grade(self.pool.call(self.key, request, check=check))


def failed(reason: str, message: str) -> SampleGrade:
    """Return the grade of a sample that has no score."""
    grade = SampleGrade()
    failure = Failure(code=CODES[Reason(reason)], reason=reason, message=message)
    grade.error.CopyFrom(failure_to_status(failure))
    return grade


def value_of(grade: SampleGrade) -> float | RewardError:
    """Return what a reward model values a sample at, or why it has no value."""
    if grade.HasField("score"):
        return grade.score
    failure = status_to_failure(grade.error)
    return RewardError(reason=Reason(failure.reason), message=failure.message)


def _told(one: float | RewardError) -> dict[str, Any]:
    return {"reason": one.reason, "message": one.message} if isinstance(one, RewardError) else {"score": one}


def _grade(answer: Mapping[str, Any]) -> SampleGrade:
    if "score" in answer:
        return SampleGrade(score=answer["score"], part_scores=answer["parts"])
    grade = failed(answer["reason"], answer["message"])
    grade.part_scores.update(answer["parts"])
    return grade
