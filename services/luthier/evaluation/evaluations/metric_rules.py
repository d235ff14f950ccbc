"""Which metrics an evaluation may have: what is taken where nobody says, and what its data or its arms cannot have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from luthier.errors import FieldViolation, InvalidArgument, Reason
from luthier.evaluation.bases import arm_of_other_tokens
from luthier.evaluation.choices import MAX_CHOICE_CHARACTERS, MAX_CHOICES
from luthier.evaluation.evaluations.verdict_rules import default_score
from luthier.runtime.field_limits import LimitTable, characters, count, named
from luthier.v1.dataset_pb2 import (
    DATASET_FORMAT_PREFERENCE,
    DATASET_FORMAT_PREFERENCE_OPENAI,
    DATASET_FORMAT_SHAREGPT_PREFERENCE,
    DATASET_FORMAT_UNSPECIFIED,
    DatasetFormat,
    DatasetVersion,
)
from luthier.v1.evaluation_pb2 import (
    EVALUATION_METRIC_BITS_PER_BYTE,
    EVALUATION_METRIC_EXACT_MATCH,
    EVALUATION_METRIC_MULTIPLE_CHOICE,
    EVALUATION_METRIC_PERPLEXITY,
    EVALUATION_METRIC_PREFERENCE,
    EVALUATION_METRIC_REWARD_MODEL,
    Evaluation,
    EvaluationMetric,
)
from luthier.v1.model_pb2 import Model

METRIC_LIMITS: LimitTable = {
    "metrics[]": named(EvaluationMetric.DESCRIPTOR),
    "choices": count(MAX_CHOICES, "choices"),
    "choices[]": characters(MAX_CHOICE_CHARACTERS),
}
DEFAULT_METRICS = (EVALUATION_METRIC_EXACT_MATCH, EVALUATION_METRIC_PERPLEXITY)
_PAIRS = frozenset(
    {DATASET_FORMAT_PREFERENCE, DATASET_FORMAT_PREFERENCE_OPENAI, DATASET_FORMAT_SHAREGPT_PREFERENCE}
)


def metric_violations(evaluation: Evaluation) -> Iterator[FieldViolation]:
    """Yield what is wrong with the metrics of a resolved evaluation, and with what single ones of them need."""
    is_valued = EVALUATION_METRIC_REWARD_MODEL in evaluation.metrics
    if is_valued and not evaluation.reward_model:
        yield FieldViolation(
            field="evaluation.reward_model",
            description="must name a reward model for the metric REWARD_MODEL, got nothing",
            reason=Reason.FIELD_REQUIRED,
        )
    if evaluation.reward_model and not is_valued:
        description = f"must be empty without the metric REWARD_MODEL, got {evaluation.reward_model!r}"
        yield FieldViolation(field="evaluation.reward_model", description=description)
    if len(set(evaluation.metrics)) != len(evaluation.metrics):
        yield FieldViolation(field="evaluation.metrics", description="must not name a metric twice")
    if not evaluation.choices:
        return
    field = "evaluation.choices"
    if EVALUATION_METRIC_MULTIPLE_CHOICE not in evaluation.metrics:
        description = f"must be empty without the metric MULTIPLE_CHOICE, got {len(evaluation.choices)}"
        yield FieldViolation(field=field, description=description)
    if len(evaluation.choices) < 2:
        yield FieldViolation(field=field, description="must be at least 2 choices, got 1")
    for index, choice in enumerate(evaluation.choices):
        if not choice.strip():
            yield FieldViolation(field=f"{field}[{index}]", description=f"must have a text, got {choice!r}")
    for choice, times in Counter(choice.strip() for choice in evaluation.choices).items():
        if choice and times > 1:
            description = f"must differ, white space at both ends aside, got {choice[:100]!r} {times} times"
            yield FieldViolation(field=field, description=description)


def fitted(
    evaluation: Evaluation, wanted: Evaluation, version: DatasetVersion, models: Mapping[str, Model]
) -> Evaluation:
    """Return a resolved evaluation whose metrics, where nobody chose them, suit its records and its arms.

    Of preference pairs those are of pairs too, and the verdict is about them; across tokenizers bits per byte stand in
    the place of perplexity.
    """
    filled = Evaluation()
    filled.CopyFrom(evaluation)
    if wanted.metrics:
        return filled
    is_apart = arm_of_other_tokens(evaluation.arms, models) is not None
    likelihood = EVALUATION_METRIC_BITS_PER_BYTE if is_apart else EVALUATION_METRIC_PERPLEXITY
    formats = _formats(evaluation, version)
    pairs = [EVALUATION_METRIC_PREFERENCE] if formats and formats <= _PAIRS else []
    del filled.metrics[:]
    filled.metrics.extend([*pairs, EVALUATION_METRIC_EXACT_MATCH, likelihood])
    filled.primary_score = wanted.primary_score or default_score(filled.metrics)
    return filled


def require_measurable(evaluation: Evaluation, version: DatasetVersion) -> None:
    """Raise InvalidArgument METRIC_NOT_MEASURED where a version's files are known not to have what a metric needs."""
    others = _formats(evaluation, version) - _PAIRS
    if EVALUATION_METRIC_PREFERENCE not in evaluation.metrics or not others:
        return
    found = ", ".join(sorted(DatasetFormat.Name(one).removeprefix("DATASET_FORMAT_") for one in others))
    raise InvalidArgument.of_fields(
        FieldViolation(
            field="evaluation.metrics",
            description=(
                f"must not have PREFERENCE, which compares the two answers of preference pairs: {version.name} has "
                f"records of {found}"
            ),
            reason=Reason.METRIC_NOT_MEASURED,
        )
    )


def _formats(evaluation: Evaluation, version: DatasetVersion) -> frozenset[DatasetFormat.ValueType]:
    """Return the known formats of the files whose records may be asked; empty where one is not known."""
    asked = [one for one in version.sources if one.split in (0, evaluation.split)]
    found = frozenset(one.detected_format or one.format for one in asked)
    return frozenset() if DATASET_FORMAT_UNSPECIFIED in found else found
