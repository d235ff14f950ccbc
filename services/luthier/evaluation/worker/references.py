"""The references of an evaluation: whether they suit its metrics, and which scores they will give."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from luthier.errors import InvalidArgument, Reason
from luthier.evaluation.worker.questions import Question
from luthier.grading.metrics.scores import score_answer
from luthier.text.rendering import reference_text
from luthier.v1 import evaluation_pb2

FIELD_SCORE = "field_match.field."
MAX_FIELDS = 100
MAX_FIELD_CHARACTERS = 100
_SHOWN_CHARACTERS = 500
_MAX_COMPARED_FIELDS = 6000
"""Fields times pairs of arms: about 300 bytes each keep an evaluation below half of what one message may hold."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grading:
    """How answers are scored: metrics of text, and the scores of fields that are shown; warnings for people."""

    metrics: tuple[str, ...]
    fields: frozenset[str]
    warnings: tuple[str, ...] = ()

    def scores(self, text: str, question: Question) -> Mapping[str, float]:
        """Return the scores of an answer that are shown."""
        scores = score_answer(self.metrics, text, reference_text(question.record))
        return {
            name: score
            for name, score in scores.items()
            if not name.startswith(FIELD_SCORE) or name in self.fields
        }


def grading_of(evaluation: evaluation_pb2.Evaluation, questions: Sequence[Question]) -> Grading:
    """Look at every reference, before the models do hours of work for nothing.

    Raises:
        InvalidArgument: INVALID_RECORDS, a reference does not suit a metric; the message names its file and line.
            METRIC_NOT_MEASURED, the verdict is to be about a field that no reference has.
    """
    metrics = _text_metrics(evaluation)
    found: Counter[str] = Counter()
    for question in questions:
        reference = reference_text(question.record)
        try:
            found.update(score_answer(metrics, reference, reference).keys())
        except ValueError as error:
            raise InvalidArgument(
                f"{question.place}: {error}",
                reason=Reason.INVALID_RECORDS,
                metadata={"filename": question.filename, "line": str(question.line)},
            ) from error
    judged = _judged_fields(evaluation, found)
    others = (name for name, _ in found.most_common() if name.startswith(FIELD_SCORE) and name not in judged)
    fields = [*judged, *others]
    short = [
        name for name in fields if name in judged or len(name) <= len(FIELD_SCORE) + MAX_FIELD_CHARACTERS
    ]
    pairs = len(evaluation.arms) * (len(evaluation.arms) - 1) // 2
    shown = short[: max(len(judged), min(MAX_FIELDS, _MAX_COMPARED_FIELDS // max(1, pairs)))]
    return Grading(metrics=metrics, fields=frozenset(shown), warnings=_left_out(len(fields), len(shown)))


def _judged_fields(evaluation: evaluation_pb2.Evaluation, found: Counter[str]) -> list[str]:
    """Return the fields' scores that a verdict or a guard is about: they are shown whatever else is."""
    wanted = dict.fromkeys([evaluation.primary_score, *(guard.score.score for guard in evaluation.guards)])
    judged = [name for name in wanted if name.startswith(FIELD_SCORE)]
    for name in judged:
        if name not in found:
            known = ", ".join(
                sorted(one.removeprefix(FIELD_SCORE) for one in found if one.startswith(FIELD_SCORE))
            )
            raise InvalidArgument(
                f"{name} is not measured: no reference has that field; they have {known[:_SHOWN_CHARACTERS]}",
                reason=Reason.METRIC_NOT_MEASURED,
                metadata={"score": name},
            )
    return judged


def _left_out(num_fields: int, num_shown: int) -> tuple[str, ...]:
    if num_shown == num_fields:
        return ()
    return (
        f"the references have {num_fields:,} fields: the {num_shown} that most records have, of names up to "
        f"{MAX_FIELD_CHARACTERS} characters, have a score of their own, the others count in field_match.fields alone",
    )


def _text_metrics(evaluation: evaluation_pb2.Evaluation) -> tuple[str, ...]:
    names = [evaluation_pb2.EvaluationMetric.Name(metric) for metric in evaluation.metrics]
    metrics = [name.removeprefix("EVALUATION_METRIC_") for name in names]
    return tuple(metric for metric in metrics if metric != "PERPLEXITY")
