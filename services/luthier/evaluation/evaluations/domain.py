"""Evaluations as values: arms on the same records, what they scored, and how they compare."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import StrEnum

from luthier.errors import FailedPrecondition, Failure, FieldViolation, InvalidArgument, Reason
from luthier.evaluation.asking import ArmTemplate, Asking, TemplateSource, arm_violations
from luthier.evaluation.metrics.scores import ScoreKind

MAX_ARMS = 16
MAX_SHOTS = 64
MAX_NEW_TOKENS = 8192
DEFAULT_NEW_TOKENS = 256


class EvaluationState(StrEnum):
    """Where an evaluation stands. The last three are final."""

    QUEUED = "QUEUED"
    RUNNING = "RUNNING"
    CANCELLING = "CANCELLING"
    CANCELLED = "CANCELLED"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"


FINAL_STATES = frozenset({EvaluationState.CANCELLED, EvaluationState.SUCCEEDED, EvaluationState.FAILED})

# A lost attempt goes back to QUEUED; work that ended before it heard of a cancel has ended all the same.
TRANSITIONS: Mapping[EvaluationState, frozenset[EvaluationState]] = {
    EvaluationState.QUEUED: frozenset(
        {
            EvaluationState.RUNNING,
            EvaluationState.CANCELLING,
            EvaluationState.CANCELLED,
            EvaluationState.FAILED,
        }
    ),
    EvaluationState.RUNNING: frozenset(
        {
            EvaluationState.QUEUED,
            EvaluationState.CANCELLING,
            EvaluationState.CANCELLED,
            EvaluationState.SUCCEEDED,
            EvaluationState.FAILED,
        }
    ),
    EvaluationState.CANCELLING: FINAL_STATES,
    **{state: frozenset() for state in FINAL_STATES},
}


class Metric(StrEnum):
    """A family of scores."""

    EXACT_MATCH = "EXACT_MATCH"
    FIELD_MATCH = "FIELD_MATCH"
    PERPLEXITY = "PERPLEXITY"


class Split(StrEnum):
    """Split of a dataset version."""

    TRAIN = "TRAIN"
    VALIDATION = "VALIDATION"
    TEST = "TEST"


class Verdict(StrEnum):
    """What a paired comparison shows."""

    BETTER = "BETTER"
    WORSE = "WORSE"
    INCONCLUSIVE = "INCONCLUSIVE"
    INSUFFICIENT_EVIDENCE = "INSUFFICIENT_EVIDENCE"


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One contender: a model, the number of examples put before each question, and the template asked with.

    An empty `chat_template` leaves it to `template`.
    """

    arm_id: str
    model: str
    num_shots: int = 0
    chat_template: str = ""
    template: ArmTemplate = ArmTemplate.UNSPECIFIED


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreEstimate:
    """A mean over `count` records with its 95 % interval. `text_form`: Unicode form that texts were compared in.

    None where nothing is known: results from before kind, direction and form were kept.
    """

    score: str
    value: float
    lower: float
    upper: float
    count: int
    kind: ScoreKind | None = None
    higher_is_better: bool | None = None
    text_form: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmResult:
    """The scores of one arm, what they cost, and with which template it was asked."""

    arm_id: str
    scores: tuple[ScoreEstimate, ...]
    num_generated_tokens: int
    num_prompt_tokens: int
    duration_seconds: float
    num_cut: int
    template_source: TemplateSource = TemplateSource.UNSPECIFIED
    template_digest: str = ""
    template_date: str = ""
    num_errors: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Candidate minus baseline on the same records, with the paired 95 % bootstrap interval.

    `kind` and `higher_is_better` as in `ScoreEstimate`.
    """

    candidate_arm_id: str
    baseline_arm_id: str
    score: str
    difference: float
    lower: float
    upper: float
    p_value: float | None
    count: int
    verdict: Verdict
    kind: ScoreKind | None = None
    higher_is_better: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far an evaluation has come."""

    phase: str
    completed: int
    total: int
    unit: str
    remaining_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerFile:
    """A blob with answers that a worker kept for the attempts after its own; `path` is its name for people."""

    path: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictionFile:
    """A blob that holds `num_rows` predictions; `prediction_file` reads it."""

    sha256: str
    size_bytes: int
    num_rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of an evaluation."""

    arm_results: tuple[ArmResult, ...]
    comparisons: tuple[Comparison, ...]
    predictions: PredictionFile
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """An evaluation. `base_model` is shared by all arms; `model_digests` has it and every adapter.

    `predictions` is None until there are some, and where they are rows of the database: evaluations of older versions.
    `askings` says how each arm is asked, by its id; an arm that it lacks is asked as the base model says.
    """

    name: str
    uid: str
    state: EvaluationState
    labels: Mapping[str, str]
    create_time: datetime
    update_time: datetime
    revision: int
    dataset_version: str
    arms: tuple[Arm, ...]
    display_name: str = ""
    split: Split = Split.TEST
    max_records: int = 0
    seed: int = 0
    metrics: tuple[Metric, ...] = (Metric.EXACT_MATCH,)
    max_new_tokens: int = DEFAULT_NEW_TOKENS
    base_model: str = ""
    dataset_digest: str = ""
    model_digests: Mapping[str, str] = field(default_factory=dict)
    askings: Mapping[str, Asking] = field(default_factory=dict)
    arm_results: tuple[ArmResult, ...] = ()
    comparisons: tuple[Comparison, ...] = ()
    num_records: int = 0
    progress: Progress | None = None
    failure: Failure | None = None
    end_time: datetime | None = None
    predictions: PredictionFile | None = None
    warnings: tuple[str, ...] = ()


def check_evaluation(evaluation: Evaluation) -> None:
    """Raise InvalidArgument that names every field that can never be right."""
    violations = tuple(_violations(evaluation))
    if violations:
        raise InvalidArgument.of_fields(*violations)


def _violations(evaluation: Evaluation) -> Iterator[FieldViolation]:
    if not 1 <= len(evaluation.arms) <= MAX_ARMS:
        description = f"must hold 1 to {MAX_ARMS} arms, got {len(evaluation.arms)}"
        yield FieldViolation(field="evaluation.arms", description=description)
    for arm_id, count in Counter(arm.arm_id for arm in evaluation.arms).items():
        if count > 1:
            description = f"arm_id must be unique, got {arm_id!r} {count} times"
            yield FieldViolation(field="evaluation.arms", description=description)
    for index, arm in enumerate(evaluation.arms):
        if not 0 <= arm.num_shots <= MAX_SHOTS:
            path = f"evaluation.arms[{index}].num_shots"
            yield FieldViolation(field=path, description=f"must be in 0..{MAX_SHOTS}, got {arm.num_shots}")
        yield from arm_violations(index, arm.chat_template, arm.template)
    if evaluation.max_records < 0:
        description = f"must not be negative, got {evaluation.max_records}"
        yield FieldViolation(field="evaluation.max_records", description=description)
    if not 1 <= evaluation.max_new_tokens <= MAX_NEW_TOKENS:
        description = f"must be in 1..{MAX_NEW_TOKENS}, got {evaluation.max_new_tokens}"
        yield FieldViolation(field="evaluation.max_new_tokens", description=description)
    if len(set(evaluation.metrics)) != len(evaluation.metrics):
        yield FieldViolation(field="evaluation.metrics", description="must not name a metric twice")


def moved(evaluation: Evaluation, state: EvaluationState, now: datetime) -> Evaluation:
    """Return the evaluation in another state.

    Raises:
        FailedPrecondition: WRONG_STATE, the move is not legal.
    """
    if state not in TRANSITIONS[evaluation.state]:
        legal = ", ".join(sorted(TRANSITIONS[evaluation.state])) or "none, it has ended"
        raise FailedPrecondition(
            f"{evaluation.name} is {evaluation.state} and cannot become {state}; possible: {legal}",
            reason=Reason.WRONG_STATE,
            metadata={"name": evaluation.name, "state": evaluation.state},
        )
    return replace(evaluation, state=state, end_time=now if state in FINAL_STATES else None)
