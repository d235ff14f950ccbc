"""The references of an evaluation: whether they suit its metrics, and which scores they will give."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from luthier.errors import InvalidArgument, Reason
from luthier.evaluation.choices import MAX_CHOICES
from luthier.evaluation.worker.alternatives import Alternatives
from luthier.evaluation.worker.questions import Question
from luthier.grading.metrics.measured import score_answer
from luthier.grading.metrics.said import Said
from luthier.grading.metrics.scores import RATIOS
from luthier.text.rendering import reference_text
from luthier.v1 import evaluation_pb2
from luthier.worker.v1 import task_pb2

FIELD_SCORE = "field_match.field."
MAX_FIELDS = 100
MAX_FIELD_CHARACTERS = 100
_SHOWN_CHARACTERS = 500
_MAX_COMPARED_FIELDS = 6000
"""Fields times pairs of arms: about 300 bytes each keep an evaluation below half of what one message may hold."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grading:
    """How answers are scored: metrics of each record, and the scores of fields that are shown; warnings for people.

    Attributes:
        metrics: those that give each record its scores.
        ratios: those that are ratios of sums over records.
        alternatives: the given texts that they need measured.
    """

    metrics: tuple[str, ...]
    fields: frozenset[str]
    ratios: frozenset[str] = frozenset()
    alternatives: Alternatives = field(default_factory=Alternatives)
    warnings: tuple[str, ...] = ()

    def scores(self, record: task_pb2.AnsweredRecord, question: Question) -> Mapping[str, float]:
        """Return the scores of an answer that are shown."""
        sides, choices = self.alternatives.parts(record)
        said = Said(
            text=record.text,
            reference=reference_text(question.record),
            num_tokens=record.num_generated_tokens,
            num_prompt_tokens=record.num_prompt_tokens,
            is_ended=record.finish_reason == evaluation_pb2.FINISH_REASON_STOP,
            sides=sides,
            choices=self.alternatives.choices,
            choice_logprobs=choices,
            reward=record.reward if record.HasField("reward") else None,
        )
        return {
            name: score
            for name, score in score_answer(self.metrics, said).items()
            if not name.startswith(FIELD_SCORE) or name in self.fields
        }


def grading_of(evaluation: evaluation_pb2.Evaluation, questions: Sequence[Question]) -> Grading:
    """Look at every reference, before the models do hours of work for nothing.

    Raises:
        InvalidArgument: INVALID_RECORDS, a record does not suit a metric; the message names its file and line.
            METRIC_NOT_MEASURED, the verdict is to be about a field that no reference has, or there are too many
            choices.
    """
    metrics = metrics_of(evaluation)
    choices = _choices(evaluation, questions) if "MULTIPLE_CHOICE" in metrics else ()
    found: Counter[str] = Counter()
    for question in questions:
        try:
            found.update(_scores_of_reference(metrics, question, choices))
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
    return Grading(
        metrics=tuple(metric for metric in metrics if metric not in RATIOS),
        fields=frozenset(shown),
        ratios=RATIOS & set(metrics),
        alternatives=Alternatives(has_sides="PREFERENCE" in metrics, choices=choices),
        warnings=_left_out(len(fields), len(shown)),
    )


def metrics_of(evaluation: evaluation_pb2.Evaluation) -> tuple[str, ...]:
    """Return the metrics of an evaluation by their names without a prefix."""
    names = [evaluation_pb2.EvaluationMetric.Name(metric) for metric in evaluation.metrics]
    return tuple(name.removeprefix("EVALUATION_METRIC_") for name in names)


def _scores_of_reference(
    metrics: Sequence[str], question: Question, choices: Sequence[str]
) -> Mapping[str, float]:
    """Return the scores that a record's own reference has. Raises ValueError where it does not suit a metric."""
    if "PREFERENCE" in metrics and question.rejected is None:
        raise ValueError(
            "PREFERENCE compares the two answers of a preference pair, this record has one answer; leave the metric "
            "out, or evaluate a version of pairs"
        )
    text = reference_text(question.record)
    said = Said(
        text=text,
        reference=text,
        sides=(0.0, 0.0),
        choices=choices,
        choice_logprobs=(0.0,) * len(choices),
    )
    return score_answer([metric for metric in metrics if metric not in RATIOS], said)


def _choices(evaluation: evaluation_pb2.Evaluation, questions: Sequence[Question]) -> tuple[str, ...]:
    """Return what MULTIPLE_CHOICE chooses between: what the evaluation says, or the references that records have."""
    if evaluation.choices:
        return tuple(evaluation.choices)
    found = sorted({reference_text(question.record).strip() for question in questions})
    if not 2 <= len(found) <= MAX_CHOICES or not all(found):
        shown = ", ".join(repr(text[:30]) for text in found[:3])
        raise InvalidArgument(
            f"MULTIPLE_CHOICE must have 2 to {MAX_CHOICES} texts to choose between, none of them empty, the references "
            f"have {len(found):,} ({shown}, ...); name them in choices, or leave the metric out",
            reason=Reason.METRIC_NOT_MEASURED,
            metadata={"metric": "MULTIPLE_CHOICE"},
        )
    return tuple(found)


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
