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
    """
    metrics = _text_metrics(evaluation)
    found: Counter[str] = Counter()
    for question in questions:
        reference = reference_text(question.record)
        try:
            found.update(score_answer(metrics, reference, reference).keys())
        except ValueError as error:
            raise InvalidArgument(f"{question.place}: {error}", reason=Reason.INVALID_RECORDS) from error
    fields = [name for name, _ in found.most_common() if name.startswith(FIELD_SCORE)]
    short = [name for name in fields if len(name) <= len(FIELD_SCORE) + MAX_FIELD_CHARACTERS]
    pairs = len(evaluation.arms) * (len(evaluation.arms) - 1) // 2
    shown = short[: min(MAX_FIELDS, _MAX_COMPARED_FIELDS // max(1, pairs))]
    return Grading(metrics=metrics, fields=frozenset(shown), warnings=_left_out(len(fields), len(shown)))


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
