"""What drift is measured with: the general suite, or records of a dataset version, each with what says it is right."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from luthier.errors import InvalidArgument, Reason
from luthier.evaluation.worker.questions import Question
from luthier.grading.metrics.measured import score_answer
from luthier.grading.metrics.said import Said
from luthier.grading.metrics.scores import is_right
from luthier.grading.suite import OF_A_VERSION, SKILLS, general_suite
from luthier.text.records import ChatRecord, Message
from luthier.text.rendering import reference_text
from luthier.v1.evaluation_pb2 import EVALUATION_METRIC_EXACT_MATCH, DriftProbe, EvaluationMetric

_FILENAME = "general_suite.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """Questions, the skill that each is of, and what says whether an answer to it is right, all by position."""

    questions: Sequence[Question]
    skills: Sequence[str]
    graders: Sequence[Callable[[str], bool]]

    @property
    def kinds(self) -> Sequence[str]:
        """All skills that it may have, in their order."""
        return (OF_A_VERSION,) if OF_A_VERSION in self.skills else SKILLS


def suite_questions() -> list[Question]:
    """Return the questions of the general suite, in its order."""
    return [
        Question(
            record_id=hashlib.sha256(item.prompt.encode()).hexdigest(),
            row=row,
            record=ChatRecord(
                messages=(
                    Message(role="user", content=item.prompt),
                    Message(role="assistant", content=item.reference),
                )
            ),
            filename=_FILENAME,
            line=row + 1,
        )
        for row, item in enumerate(general_suite())
    ]


def general(questions: Sequence[Question]) -> Suite:
    """Return some questions of the general suite with its own graders."""
    items = [general_suite()[question.row] for question in questions]
    return Suite(
        questions=questions,
        skills=[item.skill for item in items],
        graders=[item.is_right for item in items],
    )


def of_version(questions: Sequence[Question], probe: DriftProbe) -> Suite:
    """Return records of a version, graded as a probe says.

    Raises:
        InvalidArgument: INVALID_RECORDS, a reference does not suit the metric.
    """
    wanted = probe.metric or EVALUATION_METRIC_EXACT_MATCH
    metric = EvaluationMetric.Name(wanted).removeprefix("EVALUATION_METRIC_")
    for question in questions:
        try:
            _is_right(metric, reference_text(question.record), reference_text(question.record))
        except ValueError as error:
            raise InvalidArgument(
                f"drift: {question.place} of {probe.dataset_version}: {error}",
                reason=Reason.INVALID_RECORDS,
                metadata={"filename": question.filename, "line": str(question.line)},
            ) from error
    return Suite(
        questions=questions,
        skills=[OF_A_VERSION] * len(questions),
        graders=[partial(_is_right, metric, reference_text(question.record)) for question in questions],
    )


def _is_right(metric: str, reference: str, text: str) -> bool:
    return bool(is_right(score_answer([metric], Said(text=text, reference=reference))))
