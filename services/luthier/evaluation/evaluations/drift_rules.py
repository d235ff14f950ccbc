"""What may be asked of drift: what tuned arms are held against, and how much they must keep."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from luthier.errors import FailedPrecondition, FieldViolation, InvalidArgument, Reason
from luthier.evaluation.amounts import reached
from luthier.evaluation.bases import base_name
from luthier.evaluation.completeness import LEAST_GIVEN, is_whole_enough
from luthier.runtime.field_limits import LimitTable, demanded, not_negative, whole
from luthier.v1.dataset_pb2 import SPLIT_TEST, DatasetVersion, Split
from luthier.v1.evaluation_pb2 import (
    EVALUATION_METRIC_EXACT_MATCH,
    EVALUATION_METRIC_FIELD_MATCH,
    DriftProbe,
    DriftResult,
    Evaluation,
    EvaluationArm,
    EvaluationMetric,
    ScoreEstimate,
)
from luthier.v1.model_pb2 import Model
from luthier.v1.verdict_pb2 import DriftGuard, GuardResult
from luthier.worker.v1.task_pb2 import Asking

DEFAULT_NEW_TOKENS = 64
MAX_NEW_TOKENS = 1024
MAX_QUESTIONS = 1000
LEAST_KNOWN = 10
"""Below so many questions that the baseline has right nothing is said."""
DRIFT_LIMITS: LimitTable = {
    "drift.max_questions": whole(0, MAX_QUESTIONS),
    "drift.max_new_tokens": demanded(whole(1, MAX_NEW_TOKENS)),
    "guards[].drift.min_retained": not_negative(1),
}
_JUDGES = (EVALUATION_METRIC_EXACT_MATCH, EVALUATION_METRIC_FIELD_MATCH)
_BASELINE = "evaluation.drift.baseline_arm_id"
Standing = GuardResult.Standing


def resolve_drift(filled: Evaluation) -> None:
    """Fill in, in place, what a new evaluation's probe does not say and no model has to be known for."""
    if filled.HasField("drift"):
        probe = filled.drift
        probe.max_new_tokens = probe.max_new_tokens or DEFAULT_NEW_TOKENS
        if probe.dataset_version:
            probe.max_questions = probe.max_questions or MAX_QUESTIONS
            probe.split = probe.split or SPLIT_TEST
            probe.metric = probe.metric or EVALUATION_METRIC_EXACT_MATCH


def drift_violations(evaluation: Evaluation) -> Iterator[FieldViolation]:
    """Yield what is asked of drift and cannot be answered, as far as no model has to be known for that."""
    arms = [arm.arm_id for arm in evaluation.arms]
    baseline = evaluation.drift.baseline_arm_id
    if baseline and baseline not in arms:
        description = f"must be one of the arms {', '.join(arms)}, got {baseline!r}"
        yield FieldViolation(field=_BASELINE, description=description)
    yield from _suite_violations(evaluation.drift)
    for index, guard in enumerate(evaluation.guards):
        if guard.HasField("drift") and not evaluation.HasField("drift"):
            yield FieldViolation(
                field=f"evaluation.guards[{index}].drift",
                description="must be of an evaluation that measures drift; set evaluation.drift",
                reason=Reason.METRIC_NOT_MEASURED,
            )


def _suite_violations(probe: DriftProbe) -> Iterator[FieldViolation]:
    if not probe.dataset_version:
        for name, value in (
            ("split", Split.Name(probe.split)),
            ("metric", EvaluationMetric.Name(probe.metric)),
        ):
            if getattr(probe, name):
                description = f"must be unset without dataset_version, got {value}"
                yield FieldViolation(field=f"evaluation.drift.{name}", description=description)
    elif probe.metric not in _JUDGES:
        known = ", ".join(EvaluationMetric.Name(one) for one in _JUDGES)
        name = EvaluationMetric.Name(probe.metric)
        description = f"must say whether a whole answer is right, as {known} do, got {name}"
        yield FieldViolation(field="evaluation.drift.metric", description=description)


def pin_suite(evaluation: Evaluation, version: DatasetVersion) -> None:
    """Say, in place, of which very version the questions are.

    Raises FailedPrecondition WRONG_STATE where their split has no record.
    """
    probe = evaluation.drift
    found = {one.split: one.num_records for one in version.statistics.splits}
    if not found.get(probe.split):
        split = Split.Name(probe.split).removeprefix("SPLIT_")
        raise FailedPrecondition(
            f"drift: {version.name} has no record in the {split} split",
            reason=Reason.WRONG_STATE,
            metadata={"dataset_version": version.name, "split": split},
        )
    probe.dataset_digest = version.digest
    if version.name not in {one.name for one in evaluation.references}:
        evaluation.references.add(name=version.name, uid=version.uid, digest=version.digest)


def set_baseline(evaluation: Evaluation) -> None:
    """Say, in place, what the tuned arms of a new evaluation are held against; its arms have their roles.

    Raises InvalidArgument where there is no such arm, or none beside it to be judged.
    """
    if not evaluation.HasField("drift"):
        return
    prompting = [arm.arm_id for arm in evaluation.arms if not arm.tuned]
    baseline = evaluation.drift.baseline_arm_id or next(iter(prompting), "")
    if not baseline:
        raise _refused(_BASELINE, "must be set, as no arm is of a model that nobody tuned; got nothing")
    if not evaluation.candidate_arm_id:
        raise _refused(
            "evaluation.drift", "must be unset without a tuned arm, there is none to have forgotten"
        )
    if baseline == evaluation.candidate_arm_id:
        raise _refused(_BASELINE, f"must be another arm than the one that is judged, got {baseline!r}")
    evaluation.drift.baseline_arm_id = baseline


def probed_arms(evaluation: Evaluation) -> list[EvaluationArm]:
    """Return the tuned arms whose drift an evaluation measures: all of them but the baseline, in their order."""
    if not evaluation.HasField("drift"):
        return []
    baseline = evaluation.drift.baseline_arm_id
    return [arm for arm in evaluation.arms if arm.tuned and arm.arm_id != baseline]


def require_templates(evaluation: Evaluation, askings: Sequence[Asking], models: Mapping[str, Model]) -> None:
    """Raise InvalidArgument where the suite, which has turns, cannot be put to an arm of a pinned evaluation."""
    probed = {arm.arm_id for arm in probed_arms(evaluation)} | {evaluation.drift.baseline_arm_id}
    lacking = [
        arm.arm_id
        for arm, asking in zip(evaluation.arms, askings, strict=True)
        if not (asking.chat_template or models[base_name(models[arm.model])].has_chat_template)
    ]
    if lacking and evaluation.HasField("drift") and not probed.isdisjoint(lacking):
        shown = ", ".join(arm_id for arm_id in lacking if arm_id in probed)
        description = (
            f"must be unset where an arm has no chat template, as the general suite is put in turns; got {shown} "
            "without one; give it a chat_template"
        )
        violation = FieldViolation(
            field="evaluation.drift", description=description, reason=Reason.METRIC_NOT_MEASURED
        )
        raise InvalidArgument.of_fields(violation)


def require_drift(evaluation: Evaluation, found: Iterable[DriftResult]) -> None:
    """Raise InvalidArgument unless there is drift of exactly the arms whose drift was wanted, in their order."""
    baseline = evaluation.drift.baseline_arm_id
    wanted = [f"{arm.arm_id} from {baseline}" for arm in probed_arms(evaluation)]
    got = [f"{one.arm_id} from {one.baseline_arm_id}" for one in found]
    if got != wanted:
        description = f"must be of {', '.join(wanted) or 'none'}, got {', '.join(got) or 'none'}"
        raise InvalidArgument.of_fields(FieldViolation(field="drift_results", description=description))


def drift_guarded(evaluation: Evaluation, guard: DriftGuard) -> tuple[Standing.ValueType, str]:
    """Return where a guard of drift stands for the judged arm, and that in a sentence."""
    candidate, result = evaluation.candidate_arm_id, _judged(evaluation)
    if unknown := _unknown_words(evaluation, result):
        return Standing.STANDING_UNDECIDED, unknown
    baseline, found = result.baseline_arm_id, result.retained
    limit = reached(guard.min_retained, is_share=True)
    share = f"{_share_words(found)} of {found.count:,} questions{_gained_words(result)}"
    seen = f"of what {baseline} can do: {share}"
    if found.upper < guard.min_retained:
        return Standing.STANDING_BROKEN, f"{candidate} retains less than {limit} {seen}"
    if found.lower >= guard.min_retained:
        return Standing.STANDING_HELD, f"{candidate} retains at least {limit} {seen}"
    return Standing.STANDING_UNDECIDED, f"{candidate} may retain less than {limit} {seen}"


def retained_words(evaluation: Evaluation) -> str:
    """Return in words what the judged arm retains, with its interval, or why nobody knows; empty without drift."""
    if not evaluation.HasField("drift"):
        return ""
    candidate, result = evaluation.candidate_arm_id, _judged(evaluation)
    if unknown := _unknown_words(evaluation, result):
        return f"what {candidate} retains is not known: {unknown}"
    found = result.retained
    return (
        f"{candidate} retains {_share_words(found)} of what {result.baseline_arm_id} can do "
        f"({found.count:,} questions{_gained_words(result)})"
    )


def _gained_words(result: DriftResult) -> str:
    """Return how many questions the arm alone has right; empty for none."""
    num_gained = sum(skill.num_gained for skill in result.skills)
    return f", {num_gained:,} gained" if num_gained else ""


def _judged(evaluation: Evaluation) -> DriftResult:
    candidate = evaluation.candidate_arm_id
    return next((one for one in evaluation.drift_results if one.arm_id == candidate), DriftResult())


def _unknown_words(evaluation: Evaluation, result: DriftResult) -> str:
    """Return why nothing is known of what an arm retains; empty where something is."""
    baseline = evaluation.drift.baseline_arm_id or result.baseline_arm_id
    num_asked = sum(skill.num_asked for skill in result.skills)
    if not num_asked:
        return f"{baseline} answered no question of the suite, so that nobody knows what there is to retain"
    if not is_whole_enough(num_asked, result.num_unanswered):
        asked = f"{result.num_unanswered:,} of {num_asked + result.num_unanswered:,} questions of the suite"
        return f"{baseline} could not answer {asked}, and {LEAST_GIVEN:.0%} must be answered"
    if result.retained.count < LEAST_KNOWN:
        words = f"{result.retained.count} questions of the suite right, fewer than the {LEAST_KNOWN} that tell anything"
        return f"{baseline} has {words}"
    return ""


def _share_words(found: ScoreEstimate) -> str:
    value, lower, upper = (reached(one, is_share=True) for one in (found.value, found.lower, found.upper))
    return f"{value} [{lower}, {upper}]"


def _refused(field: str, description: str) -> InvalidArgument:
    return InvalidArgument.of_fields(FieldViolation(field=field, description=description))
