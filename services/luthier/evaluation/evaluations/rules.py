"""What evaluations may be: defaults, limits, what they pin, and which state follows which."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

from luthier.errors import FailedPrecondition, FieldViolation, InvalidArgument, Reason
from luthier.evaluation.asking import MAX_TEMPLATES_BYTES
from luthier.evaluation.bases import base_name
from luthier.evaluation.evaluations.drift_rules import require_drift, resolve_drift
from luthier.evaluation.evaluations.grader_rules import GRADER_LIMITS, graders_violations, require_graders
from luthier.evaluation.evaluations.judge_rules import (
    JUDGE_LIMITS,
    check_judge_references,
    judge_violations,
    judging_arms,
    pin_judges,
    require_judges,
    resolve_judges,
)
from luthier.evaluation.evaluations.metric_rules import DEFAULT_METRICS, METRIC_LIMITS, metric_violations
from luthier.evaluation.evaluations.telling import blind_warnings, loss_warnings
from luthier.evaluation.evaluations.verdict_rules import (
    VERDICT_LIMITS,
    default_score,
    set_roles,
    verdict_violations,
)
from luthier.evaluation.evaluations.verdicts import verdict_of
from luthier.evaluation.names import VERSION, WEIGHTS
from luthier.evaluation.reward_models import check_names, named_by
from luthier.grading.metrics.scores import find_score, is_right
from luthier.runtime.field_limits import (
    Limit,
    LimitTable,
    characters,
    count,
    demanded,
    limit_violations,
    num_bytes,
    refuse,
    whole,
)
from luthier.runtime.labels import DISPLAY_NAME, label_violations
from luthier.runtime.names import ID_LIMIT
from luthier.runtime.webhook_limits import LIMITS as WEBHOOK_LIMITS
from luthier.stored.v1.evaluation_pb2 import EvaluationPrivate
from luthier.v1.dataset_pb2 import SPLIT_TEST, DatasetVersion, Split
from luthier.v1.evaluation_pb2 import (
    CORRECTNESS_RIGHT,
    CORRECTNESS_UNSPECIFIED,
    CORRECTNESS_WRONG,
    ArmTemplate,
    Evaluation,
    EvaluationArm,
    Prediction,
    ShotChoice,
)
from luthier.v1.model_pb2 import Model
from luthier.worker.v1.task_pb2 import (
    AnswerShare,
    ArmModel,
    BlobFile,
    EvaluateResult,
    EvaluateSpec,
    ModelReference,
)

MAX_ARMS = 16
MAX_SHOTS = 64
MAX_SYSTEM_CHARACTERS = 32_768
MAX_NEW_TOKENS = 8192
MAX_WORKERS = 64
DEFAULT_NEW_TOKENS = 256
LIMITS: LimitTable = {
    "arms": count(MAX_ARMS, "arms", least=1),
    "arms[].arm_id": demanded(ID_LIMIT),
    "arms[].num_shots": whole(0, MAX_SHOTS),
    "arms[].chat_template": num_bytes(MAX_TEMPLATES_BYTES),
    "arms[].system_prompt": characters(MAX_SYSTEM_CHARACTERS),
    "max_records": Limit(rule="must not be negative", allows=lambda value: value >= 0),
    "max_new_tokens": demanded(whole(1, MAX_NEW_TOKENS)),
    "max_workers": whole(1, MAX_WORKERS),
    "display_name": DISPLAY_NAME,
    **METRIC_LIMITS,
    **VERDICT_LIMITS,
    **JUDGE_LIMITS,
    **GRADER_LIMITS,
    **WEBHOOK_LIMITS,
}
"""Of an evaluation with every default filled in."""
State = Evaluation.State
# A lost attempt goes back to QUEUED; work that ended before it heard of a cancel has ended all the same.
TRANSITIONS: Mapping[int, Sequence[int]] = {
    State.STATE_QUEUED: (
        State.STATE_RUNNING,
        State.STATE_CANCELLING,
        State.STATE_CANCELLED,
        State.STATE_FAILED,
    ),
    State.STATE_RUNNING: (
        State.STATE_QUEUED,
        State.STATE_CANCELLING,
        State.STATE_CANCELLED,
        State.STATE_SUCCEEDED,
        State.STATE_FAILED,
    ),
    State.STATE_CANCELLING: (State.STATE_CANCELLED, State.STATE_SUCCEEDED, State.STATE_FAILED),
    State.STATE_CANCELLED: (),
    State.STATE_SUCCEEDED: (),
    State.STATE_FAILED: (),
}
_CORRECTNESS = {None: CORRECTNESS_UNSPECIFIED, True: CORRECTNESS_RIGHT, False: CORRECTNESS_WRONG}


def resolved(evaluation: Evaluation) -> Evaluation:
    """Return a new evaluation with every default filled in, QUEUED."""
    filled = _copy(evaluation)
    filled.state = State.STATE_QUEUED
    filled.split = evaluation.split or SPLIT_TEST
    filled.max_new_tokens = evaluation.max_new_tokens or DEFAULT_NEW_TOKENS
    filled.max_workers = evaluation.max_workers or 1
    if not evaluation.metrics:
        filled.metrics.extend(DEFAULT_METRICS)
    filled.primary_score = evaluation.primary_score or default_score(filled.metrics)
    resolve_drift(filled)
    resolve_judges(filled)
    return filled


def check(evaluation: Evaluation) -> None:
    """Raise InvalidArgument that names every field of a resolved evaluation that can never be right."""
    refuse(
        [
            *limit_violations(evaluation, LIMITS, "evaluation"),
            *_arms_violations(evaluation.arms),
            *metric_violations(evaluation),
            *verdict_violations(evaluation),
            *judge_violations(evaluation),
            *graders_violations(evaluation),
            *label_violations(evaluation.labels, "evaluation.labels"),
        ]
    )


def check_references(evaluation: Evaluation) -> None:
    """Raise InvalidArgument for the first name that is malformed."""
    VERSION.parse(evaluation.dataset_version, field="evaluation.dataset_version")
    if evaluation.drift.dataset_version:
        VERSION.parse(evaluation.drift.dataset_version, field="evaluation.drift.dataset_version")
    check_names(named_by(evaluation))
    for index, arm in enumerate(evaluation.arms):
        WEIGHTS.parse(arm.model, field=f"evaluation.arms[{index}].model")
    check_judge_references(evaluation)


def require_records(evaluation: Evaluation, version: DatasetVersion) -> int:
    """Return how many records are asked. Raises FailedPrecondition WRONG_STATE where their split has none."""
    found = {_split(one.split): one.num_records for one in version.statistics.splits}
    split = _split(evaluation.split)
    if not found.get(split):
        raise FailedPrecondition(
            f"{version.name} has no record in the {split} split; it has {found}",
            reason=Reason.WRONG_STATE,
            metadata={"dataset_version": version.name, "split": split},
        )
    return min(found[split], evaluation.max_records or found[split])


def pinned(evaluation: Evaluation, version: DatasetVersion, models: Mapping[str, Model]) -> Evaluation:
    """Return an evaluation with the uids and digests of all that it builds on, and what its arms are to its verdict.

    Raises InvalidArgument where the arm that is to be judged is not tuned.
    """
    filled = _copy(evaluation)
    set_roles(filled, models)
    for arm in filled.arms:
        arm.base_model = base_name(models[arm.model])
    pin_judges(filled, models)
    filled.references.add(name=version.name, uid=version.uid, digest=version.digest)
    for name, model in models.items():
        filled.references.add(name=name, uid=model.uid, digest=model.digest)
    filled.dataset_digest = version.digest
    filled.model_digests.update({name: model.digest for name, model in models.items()})
    return filled


def spec(
    evaluation: Evaluation,
    private: EvaluationPrivate,
    answers: Sequence[BlobFile],
    share: AnswerShare | None = None,
) -> EvaluateSpec:
    """Return what a worker needs to run an evaluation or a share of it, going on after the answers that are there."""

    def reference(name: str) -> ModelReference:
        return ModelReference(name=name, digest=evaluation.model_digests[name])

    arms = [_arm(arm, base_of(arm, private), reference) for arm in evaluation.arms]
    for arm, asking in zip(arms, private.askings, strict=False):
        arm.asking.CopyFrom(asking)
    judges = [_arm(arm, arm.base_model, reference) for arm in judging_arms(evaluation)]
    for judge, asking in zip(judges, private.judge_askings, strict=True):
        judge.asking.CopyFrom(asking)
    bases = {arm.base_model.name for arm in arms}
    return EvaluateSpec(
        evaluation=evaluation,
        base_model=arms[0].base_model if len(bases) == 1 else None,
        arms=arms,
        checkpoint_files=answers,
        training_versions=private.training_versions,
        unknown_models=private.unknown_models,
        share=share,
        reward_models=private.reward_models,
        judges=judges,
    )


def base_of(arm: EvaluationArm, private: EvaluationPrivate) -> str:
    """Return the name of the base model of an arm, of an evaluation however old."""
    return arm.base_model or private.base_model


def _arm(arm: EvaluationArm, base: str, reference: Callable[[str], ModelReference]) -> ArmModel:
    adapter = reference(arm.model) if arm.model != base else None
    return ArmModel(arm=arm, base_model=reference(base), adapter=adapter)


def scored(evaluation: Evaluation, result: EvaluateResult) -> Evaluation:
    """Return an evaluation with its outcome and its verdict; its results say which scores judge a whole answer.

    Raises InvalidArgument for results of other arms, judges or graders than it has, and for drift of others than it
    measures.
    """
    _require_its_arms(evaluation, result)
    filled = _copy(evaluation)
    filled.arm_results.extend(result.arm_results)
    filled.comparisons.extend(result.comparisons)
    filled.warnings.extend(result.warnings)
    filled.num_records = result.num_records
    filled.drift_results.extend(result.drift_results)
    filled.judge_results.extend(result.judge_results)
    filled.grader_results.extend(result.grader_results)
    if result.HasField("contamination"):
        filled.contamination.CopyFrom(result.contamination)
    for arm in filled.arm_results:
        for estimate in arm.scores:
            estimate.whole_answer = _judges_whole_answer(estimate.score)
    for apart in (*filled.contamination.clean, *filled.contamination.contaminated):
        for estimate in apart.scores:
            estimate.whole_answer = _judges_whole_answer(estimate.score)
    for comparison in filled.comparisons:
        comparison.whole_answer = _judges_whole_answer(comparison.score)
    filled.warnings.extend((*loss_warnings(filled), *blind_warnings(filled)))
    if filled.primary_score:
        filled.verdict.CopyFrom(verdict_of(filled))
    return filled


def judged(prediction: Prediction) -> Prediction:
    """Return a stored prediction, however old, whose answers say whether they are right."""
    filled = Prediction()
    filled.CopyFrom(prediction)
    for answer in filled.answers:
        answer.correctness = _CORRECTNESS[is_right(answer.scores)]
    return filled


def _require_its_arms(evaluation: Evaluation, result: EvaluateResult) -> None:
    wanted, found = ([arm.arm_id for arm in arms] for arms in (evaluation.arms, result.arm_results))
    if found != wanted:
        description = f"must be of the arms {', '.join(wanted)}, got {', '.join(found) or 'none'}"
        raise InvalidArgument.of_fields(FieldViolation(field="arm_results", description=description))
    pairs = [
        (f"comparisons[{index}]", {one.candidate_arm_id, one.baseline_arm_id})
        for index, one in enumerate(result.comparisons)
    ]
    for field, arms in pairs:
        if foreign := arms - set(wanted):
            description = f"must be of the arms {', '.join(wanted)}, got {', '.join(sorted(foreign))}"
            raise InvalidArgument.of_fields(FieldViolation(field=field, description=description))
    require_drift(evaluation, result.drift_results)
    require_judges(evaluation, result.judge_results)
    require_graders(evaluation, result.grader_results)


def _copy(evaluation: Evaluation) -> Evaluation:
    copy = Evaluation()
    copy.CopyFrom(evaluation)
    return copy


def _judges_whole_answer(name: str) -> bool:
    score = find_score(name)
    return score is not None and score.whole_answer


def _split(split: Split.ValueType) -> str:
    return Split.Name(split).removeprefix("SPLIT_")


def _arms_violations(arms: Sequence[EvaluationArm]) -> Iterator[FieldViolation]:
    path = "evaluation.arms"
    for arm_id, times in Counter(arm.arm_id for arm in arms).items():
        if times > 1:
            description = f"arm_id must be unique, got {arm_id!r} {times} times"
            yield FieldViolation(field=path, description=description)
    for index, arm in enumerate(arms):
        if arm.chat_template and arm.template:
            template = ArmTemplate.Name(arm.template).removeprefix("ARM_TEMPLATE_")
            description = f"must be unset beside chat_template, got {template}"
            yield FieldViolation(field=f"{path}[{index}].template", description=description)
        if arm.shot_choice and not arm.num_shots:
            choice = ShotChoice.Name(arm.shot_choice).removeprefix("SHOT_CHOICE_")
            description = f"must be unset without num_shots, got {choice}"
            yield FieldViolation(field=f"{path}[{index}].shot_choice", description=description)
        if arm.system_prompt and not arm.system_prompt.strip():
            got = f"got {arm.system_prompt!r}"
            description = f"must hold more than white space, {got}; leave it out to ask as records do"
            yield FieldViolation(field=f"{path}[{index}].system_prompt", description=description)
