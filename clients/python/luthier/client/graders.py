"""Graders by short names, and grades in words."""

from __future__ import annotations

from collections.abc import Iterator

from luthier.client import names
from luthier.v1.evaluation_pb2 import ArmPrediction
from luthier.v1.grader_pb2 import Grader, GraderResult, SampleGrade


def name_reward_models(project_id: str, grader: Grader) -> None:
    """Give the reward models that a grader names, deeper ones too, their whole names, in place."""
    if grader.reward_model.model:
        grader.reward_model.model = names.weights(project_id, grader.reward_model.model)
    for inner in grader.multi.graders.values():
        name_reward_models(project_id, inner)


def lost_words(result: GraderResult) -> str:
    """Return `3 of 96: 2 REWARD_FAILED, 1 GRADER_INPUT_INVALID`; `0 of 96` where every answer has a score."""
    told = ", ".join(f"{one.count:,} {one.reason}" for one in result.errors)
    return f"{result.num_errors:,} of {result.num_graded:,}{f': {told}' if told else ''}"


def first_error(result: GraderResult) -> str:
    """Return the words of the first error of the most frequent reason; empty where there is none."""
    return result.errors[0].first_message if result.errors else ""


def grade_words(grade: SampleGrade) -> str:
    """Return `0.62 (right 1, short 0.24)`, or why there is no score."""
    parts = ", ".join(f"{name} {score:.4g}" for name, score in sorted(grade.part_scores.items()))
    value = f"{grade.score:.4g}" if grade.HasField("score") else f"no score, {grade.error.message}"
    return f"{value} ({parts})" if parts else value


def grade_lines(answer: ArmPrediction) -> Iterator[tuple[str, str]]:
    """Yield the graders of an answer by their names, each with what it made of it."""
    for name, grade in sorted(answer.grades.items()):
        yield name, grade_words(grade)
