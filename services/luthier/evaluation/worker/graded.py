"""From what graders made of answers to scores of arms, and to how many have none and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from luthier.errors.status import status_to_failure
from luthier.grading.metrics.scores import GRADED
from luthier.v1.grader_pb2 import GraderErrors, GraderResult, SampleGrade

_MAX_REASONS = 16
Grades = Mapping[str, SampleGrade]
"""By the name of the grader."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Graded:
    """What came of graders.

    Attributes:
        grades: of an arm's answers, by arm and row.
        results: what is known of each grader.
        warnings: for people.
    """

    grades: Mapping[tuple[str, int], Grades] = field(default_factory=dict)
    results: Sequence[GraderResult] = ()
    warnings: Sequence[str] = ()

    def of(self, arm_id: str, row: int) -> Grades:
        """Return what graders made of an arm's answer."""
        return self.grades.get((arm_id, row), {})

    def scores(self, arm_id: str, row: int) -> dict[str, float]:
        """Return the scores of an arm's answer: of a grader that gave it none there is none."""
        grades = self.of(arm_id, row)
        return {f"{GRADED}{name}": one.score for name, one in grades.items() if one.HasField("score")}


NOTHING_GRADED = Graded()


def graded(names: Sequence[str], grades: Mapping[tuple[str, int], Grades]) -> Graded:
    """Return what came of the graders of these names."""
    results = [_result(name, (found[name] for found in grades.values() if name in found)) for name in names]
    return Graded(grades=grades, results=results, warnings=[*_warnings(results)])


def _result(name: str, grades: Iterable[SampleGrade]) -> GraderResult:
    made = list(grades)
    failures = [status_to_failure(one.error) for one in made if one.HasField("error")]
    counts = Counter(failure.reason for failure in failures)
    firsts = {failure.reason: failure.message for failure in reversed(failures)}
    return GraderResult(
        name=name,
        num_graded=len(made),
        num_errors=len(failures),
        errors=[
            GraderErrors(reason=reason, count=count, first_message=firsts[reason])
            for reason, count in counts.most_common(_MAX_REASONS)
        ],
    )


def _warnings(results: Iterable[GraderResult]) -> Iterator[str]:
    for one in results:
        if one.num_errors:
            reasons = ", ".join(f"{found.count:,} {found.reason}" for found in one.errors)
            yield (
                f"grader {one.name} gave no score to {one.num_errors:,} of {one.num_graded:,} answers ({reasons}), "
                f"which count in no score of it; the first: {one.errors[0].first_message}"
            )
