"""What a verdict may be asked for: which score decides, which arm is judged, and what must not get worse."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

from luthier.errors import FieldViolation, InvalidArgument, Reason
from luthier.evaluation.bases import bases_of
from luthier.evaluation.evaluations.drift_rules import DRIFT_LIMITS, drift_violations, set_baseline
from luthier.evaluation.evaluations.grader_rules import scores_of_graders
from luthier.evaluation.evaluations.judge_rules import scores_of_judges
from luthier.grading.metrics.scores import find_score, main_score, scores_given
from luthier.runtime.field_limits import Limit, LimitTable, characters, count, demanded
from luthier.v1.evaluation_pb2 import Evaluation, EvaluationArm, EvaluationMetric
from luthier.v1.model_pb2 import Model

MAX_GUARDS = 16
_SCORE = characters(200)
_AMOUNT = Limit(rule="must be a number of at least 0", allows=lambda value: 0 <= value < math.inf)
VERDICT_LIMITS: LimitTable = {
    "primary_score": _SCORE,
    "smallest_difference": _AMOUNT,
    "guards": count(MAX_GUARDS, "guards"),
    "guards[].score.score": demanded(_SCORE),
    "guards[].score.max_loss": _AMOUNT,
    **DRIFT_LIMITS,
}


def default_score(metrics: Sequence[EvaluationMetric.ValueType]) -> str:
    """Return the score that a verdict is about when nobody says; empty for a metric without a name."""
    return main_score(_name(metrics[0])) if metrics and metrics[0] else ""


def verdict_violations(evaluation: Evaluation) -> Iterator[FieldViolation]:
    """Yield what is asked of a resolved evaluation's verdict and cannot be answered."""
    metrics = [_name(metric) for metric in evaluation.metrics if metric]
    given = [*scores_given(metrics), *scores_of_judges(evaluation), *scores_of_graders(evaluation)]
    if evaluation.primary_score and not _is_given(evaluation.primary_score, given):
        yield _not_measured("evaluation.primary_score", evaluation.primary_score, given)
    arms = [arm.arm_id for arm in evaluation.arms]
    if evaluation.candidate_arm_id and evaluation.candidate_arm_id not in arms:
        yield _unknown_arm("evaluation.candidate_arm_id", evaluation.candidate_arm_id, arms)
    for index, guard in enumerate(evaluation.guards):
        if guard.WhichOneof("guarded") is None:
            description = "must be one of score and drift, got none"
            field = f"evaluation.guards[{index}]"
            yield FieldViolation(field=field, description=description, reason=Reason.FIELD_REQUIRED)
        path, score = f"evaluation.guards[{index}].score", guard.score
        if score.score and not _is_given(score.score, given):
            yield _not_measured(f"{path}.score", score.score, given)
        if score.baseline_arm_id and score.baseline_arm_id not in arms:
            yield _unknown_arm(f"{path}.baseline_arm_id", score.baseline_arm_id, arms)
    yield from drift_violations(evaluation)


def tuned_arms(arms: Iterable[EvaluationArm], models: Mapping[str, Model]) -> set[str]:
    """Return the ids of the arms that are tuned: adapters, and weights of a job but those that are below all arms."""
    arms = list(arms)
    bases = bases_of(arms, models)
    shared = bases[0] if len(bases) == 1 else ""
    below = {models[arm.model].base_model for arm in arms} & {shared}
    return {
        arm.arm_id
        for arm in arms
        if models[arm.model].base_model or (models[arm.model].fine_tuning_job and arm.model not in below)
    }


def set_roles(evaluation: Evaluation, models: Mapping[str, Model]) -> None:
    """Say, in place, which arms of a new evaluation are tuned and which of them is judged.

    Raises InvalidArgument where the arm that is to be judged is not tuned, or is held against itself, and as
    `set_baseline`.
    """
    tuned = tuned_arms(evaluation.arms, models)
    for arm in evaluation.arms:
        arm.tuned = arm.arm_id in tuned
    wanted = evaluation.candidate_arm_id
    if wanted and wanted not in tuned:
        shown = ", ".join(arm.arm_id for arm in evaluation.arms if arm.tuned) or "there is none"
        description = f"must be an arm of a tuned model ({shown}), got {wanted!r}"
        raise InvalidArgument.of_fields(
            FieldViolation(field="evaluation.candidate_arm_id", description=description)
        )
    if not wanted and tuned:
        evaluation.candidate_arm_id = [arm.arm_id for arm in evaluation.arms if arm.tuned][-1]
    for index, guard in enumerate(evaluation.guards):
        if guard.score.baseline_arm_id == evaluation.candidate_arm_id != "":
            description = (
                f"must be another arm than the one that is judged, got {evaluation.candidate_arm_id!r}"
            )
            field = f"evaluation.guards[{index}].score.baseline_arm_id"
            raise InvalidArgument.of_fields(FieldViolation(field=field, description=description))
    set_baseline(evaluation)


def _name(metric: EvaluationMetric.ValueType) -> str:
    return EvaluationMetric.Name(metric).removeprefix("EVALUATION_METRIC_")


def _is_given(name: str, given: Sequence[str]) -> bool:
    score = find_score(name)
    return name in given or (score is not None and score.name in given)


def _not_measured(field: str, name: str, given: Sequence[str]) -> FieldViolation:
    shown = ", ".join(f"{one}NAME" if one.endswith(".") else one for one in given)
    description = f"must be a score that the metrics give ({shown}), got {name!r}"
    return FieldViolation(field=field, description=description, reason=Reason.METRIC_NOT_MEASURED)


def _unknown_arm(field: str, arm_id: str, arms: Sequence[str]) -> FieldViolation:
    return FieldViolation(
        field=field, description=f"must be one of the arms {', '.join(arms)}, got {arm_id!r}"
    )
