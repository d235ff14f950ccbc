"""What evaluations may be: defaults, limits, what they pin, and which state follows which."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from luthier.errors import FailedPrecondition, FieldViolation, InvalidArgument, Reason
from luthier.evaluation.asking import MAX_TEMPLATES_BYTES
from luthier.evaluation.evaluations.verdict_rules import (
    VERDICT_LIMITS,
    default_score,
    set_roles,
    verdict_violations,
)
from luthier.evaluation.evaluations.verdicts import verdict_of
from luthier.evaluation.names import VERSION, WEIGHTS
from luthier.grading.metrics.scores import find_score, is_right
from luthier.runtime.field_limits import (
    ANY,
    DIGEST,
    REQUIRED,
    Limit,
    LimitTable,
    count,
    demanded,
    limit_violations,
    matching,
    named,
    not_negative,
    num_bytes,
    refuse,
    under,
    whole,
)
from luthier.runtime.labels import DISPLAY_NAME, label_violations
from luthier.runtime.names import ID_LIMIT, same_project
from luthier.runtime.result_limits import FILE, TEXT, UNSAID, WARNINGS
from luthier.stored.v1.evaluation_pb2 import EvaluationPrivate
from luthier.v1.dataset_pb2 import SPLIT_TEST, DatasetVersion, Split
from luthier.v1.evaluation_pb2 import (
    CORRECTNESS_RIGHT,
    CORRECTNESS_UNSPECIFIED,
    CORRECTNESS_WRONG,
    EVALUATION_METRIC_EXACT_MATCH,
    ArmTemplate,
    ContaminationKind,
    Evaluation,
    EvaluationArm,
    EvaluationMetric,
    Prediction,
    ScoreDirection,
    ScoreKind,
    TemplateSource,
    Verdict,
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
MAX_NEW_TOKENS = 8192
MAX_WORKERS = 64
DEFAULT_NEW_TOKENS = 256
MAX_SCORES = 256
"""Of an arm. A worker gives a hundred fields scores of their own."""
MAX_COMPARISONS = 10_000
MAX_TRAINING_VERSIONS = 256
MAX_RECORDS = (1 << 31) - 1
_DATE = matching(re.compile(r"\d{4}-\d{2}-\d{2}"), "a date, YYYY-MM-DD")
LIMITS: LimitTable = {
    "arms": count(MAX_ARMS, "arms", least=1),
    "arms[].arm_id": demanded(ID_LIMIT),
    "arms[].num_shots": whole(0, MAX_SHOTS),
    "arms[].chat_template": num_bytes(MAX_TEMPLATES_BYTES),
    "max_records": Limit(rule="must not be negative", allows=lambda value: value >= 0),
    "max_new_tokens": demanded(whole(1, MAX_NEW_TOKENS)),
    "max_workers": whole(1, MAX_WORKERS),
    "metrics[]": named(EvaluationMetric.DESCRIPTOR),
    "display_name": DISPLAY_NAME,
    **VERDICT_LIMITS,
}
"""Of an evaluation with every default filled in."""
_PROBABILITY = not_negative(1)
_OF_A_SCORE: LimitTable = {
    "score": (REQUIRED, TEXT),
    "lower": ANY,
    "upper": ANY,
    "count": ANY,
    "kind": named(ScoreKind.DESCRIPTOR),
    "direction": named(ScoreDirection.DESCRIPTOR),
    "whole_answer": UNSAID,
}
_ESTIMATE: LimitTable = {**_OF_A_SCORE, "value": ANY, "text_form": ANY}
_APART: LimitTable = {
    "arm_id": demanded(ID_LIMIT),
    "scores": count(MAX_SCORES, "scores"),
    **under("scores[]", _ESTIMATE),
}
_CONTAMINATION: LimitTable = {
    "versions": count(MAX_TRAINING_VERSIONS, "versions"),
    "versions[]": (REQUIRED, TEXT),
    "num_training_records": ANY,
    "num_exact": ANY,
    "num_normalised": ANY,
    "num_ngram": ANY,
    "records": count(1000, "records"),
    "records[].row": ANY,
    "records[].record_id": DIGEST,
    "records[].kind": named(ContaminationKind.DESCRIPTOR),
    "records[].overlap": demanded(_PROBABILITY),
    "records[].version": (REQUIRED, TEXT),
    "records[].filename": TEXT,
    "records[].line": ANY,
    "clean": count(MAX_ARMS, "arms"),
    **under("clean[]", _APART),
    "contaminated": count(MAX_ARMS, "arms"),
    **under("contaminated[]", _APART),
    "unknown_models": count(MAX_ARMS, "models"),
    "unknown_models[]": (REQUIRED, TEXT),
}
RESULT_LIMITS: LimitTable = {
    "arm_results": count(MAX_ARMS, "arms", least=1),
    "arm_results[].arm_id": demanded(ID_LIMIT),
    "arm_results[].scores": count(MAX_SCORES, "scores"),
    **under("arm_results[].scores[]", _ESTIMATE),
    "arm_results[].num_generated_tokens": ANY,
    "arm_results[].num_prompt_tokens": ANY,
    "arm_results[].duration_seconds": ANY,
    "arm_results[].num_cut": ANY,
    "arm_results[].template_source": named(TemplateSource.DESCRIPTOR),
    "arm_results[].template_digest": DIGEST,
    "arm_results[].template_date": demanded(_DATE),
    "arm_results[].num_errors": ANY,
    "comparisons": count(MAX_COMPARISONS, "comparisons"),
    "comparisons[].candidate_arm_id": demanded(ID_LIMIT),
    "comparisons[].baseline_arm_id": demanded(ID_LIMIT),
    **under("comparisons[]", _OF_A_SCORE),
    "comparisons[].difference": ANY,
    "comparisons[].p_value": _PROBABILITY,
    "comparisons[].verdict": named(Verdict.DESCRIPTOR),
    "comparisons[].confidence": Limit(rule="must be in (0, 1)", allows=lambda value: 0 < value < 1),
    "comparisons[].adjusted_p_value": _PROBABILITY,
    "comparisons[].method": ANY,
    "comparisons[].primary": ANY,
    "num_records": demanded(whole(1, MAX_RECORDS)),
    "predictions": REQUIRED,
    **under("predictions", FILE),
    **under("contamination", _CONTAMINATION),
    **WARNINGS,
}
"""What a worker may say of an evaluation that it ran, or could not run to its end."""
SHARE_LIMITS: LimitTable = {
    "num_records": demanded(whole(1, MAX_RECORDS)),
    "predictions": REQUIRED,
    **under("predictions", FILE),
}
"""What a worker may say of a share of an evaluation, answered or not."""

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
        filled.metrics.append(EVALUATION_METRIC_EXACT_MATCH)
    filled.primary_score = evaluation.primary_score or default_score(filled.metrics)
    return filled


def check(evaluation: Evaluation) -> None:
    """Raise InvalidArgument that names every field of a resolved evaluation that can never be right."""
    refuse(
        [
            *limit_violations(evaluation, LIMITS, "evaluation"),
            *_arms_violations(evaluation.arms),
            *_metric_violations(evaluation.metrics),
            *verdict_violations(evaluation),
            *label_violations(evaluation.labels, "evaluation.labels"),
        ]
    )


def check_references(parent: str, evaluation: Evaluation) -> None:
    """Raise InvalidArgument for the first name that is malformed or of another project than `parent`."""
    path = "evaluation.dataset_version"
    VERSION.parse(evaluation.dataset_version, field=path)
    same_project(parent, evaluation.dataset_version, path)
    for index, arm in enumerate(evaluation.arms):
        path = f"evaluation.arms[{index}]"
        WEIGHTS.parse(arm.model, field=f"{path}.model")
        same_project(parent, arm.model, f"{path}.model")


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


def shared_base(arms: Sequence[EvaluationArm], models: Mapping[str, Model]) -> str:
    """Return the name of the base model of all arms. Raises InvalidArgument when they have several."""
    bases = {models[arm.model].base_model or arm.model: arm.arm_id for arm in arms}
    if len(bases) > 1:
        shown = ", ".join(f"{arm_id}: {base}" for base, arm_id in bases.items())
        description = f"all arms must share one base model, got {shown}"
        raise InvalidArgument.of_fields(FieldViolation(field="evaluation.arms", description=description))
    return next(iter(bases))


def pinned(evaluation: Evaluation, version: DatasetVersion, models: Mapping[str, Model]) -> Evaluation:
    """Return an evaluation with the uids and digests of all that it builds on, and what its arms are to its verdict.

    Raises InvalidArgument where the arm that is to be judged is not tuned.
    """
    filled = _copy(evaluation)
    set_roles(filled, models)
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

    arms = [
        ArmModel(arm=arm, adapter=reference(arm.model) if arm.model != private.base_model else None)
        for arm in evaluation.arms
    ]
    for arm, asking in zip(arms, private.askings, strict=False):
        arm.asking.CopyFrom(asking)
    return EvaluateSpec(
        evaluation=evaluation,
        base_model=reference(private.base_model),
        arms=arms,
        checkpoint_files=answers,
        training_versions=private.training_versions,
        unknown_models=private.unknown_models,
        share=share,
    )


def scored(evaluation: Evaluation, result: EvaluateResult) -> Evaluation:
    """Return an evaluation with its outcome and its verdict; its results say which scores judge a whole answer.

    Raises InvalidArgument for results of other arms than it has.
    """
    _require_its_arms(evaluation, result)
    filled = _copy(evaluation)
    filled.arm_results.extend(result.arm_results)
    filled.comparisons.extend(result.comparisons)
    filled.warnings.extend(result.warnings)
    filled.num_records = result.num_records
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
    for index, one in enumerate(result.comparisons):
        if foreign := {one.candidate_arm_id, one.baseline_arm_id} - set(wanted):
            description = f"must be of the arms {', '.join(wanted)}, got {', '.join(sorted(foreign))}"
            raise InvalidArgument.of_fields(
                FieldViolation(field=f"comparisons[{index}]", description=description)
            )


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


def _metric_violations(metrics: Sequence[EvaluationMetric.ValueType]) -> Iterator[FieldViolation]:
    if len(set(metrics)) != len(metrics):
        yield FieldViolation(field="evaluation.metrics", description="must not name a metric twice")
