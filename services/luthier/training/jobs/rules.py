"""What jobs may be: defaults, limits, and which state follows which."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from luthier.errors import FieldViolation, InvalidArgument, Reason
from luthier.runtime import names
from luthier.runtime.field_limits import (
    Limit,
    fill_defaults,
    limit_violations,
    not_negative,
    positive,
    whole,
)
from luthier.runtime.labels import display_name_violations, label_violations
from luthier.training.names import MODEL, RENDERING
from luthier.v1.fine_tuning_job_pb2 import LEARNING_RATE_SCHEDULE_COSINE, FineTuningJob
from luthier.v1.model_pb2 import Taught
from luthier.v1.rendering_pb2 import Rendering

MAX_STEPS = 10_000_000
MAX_BATCH_TOKENS = 1 << 24
MAX_TARGETS = 256
_ROOT = "fine_tuning_job"
_ALPHA_OVER_RANK = 2.0

# Far beyond any use; what float32 cannot hold would stop the worker instead of the caller.
LIMITS: Mapping[str, Limit] = {
    "lora.rank": whole(1, 512),
    "lora.alpha": positive(1e6),
    "hyperparameters.num_epochs": whole(1, 10_000),
    "hyperparameters.max_steps": whole(0, MAX_STEPS),
    "hyperparameters.micro_batch_tokens": whole(1, MAX_BATCH_TOKENS),
    "hyperparameters.learning_rate": positive(1000.0),
    "hyperparameters.warmup_steps": whole(0, MAX_STEPS),
    "hyperparameters.weight_decay": not_negative(1000.0),
    "hyperparameters.max_grad_norm": not_negative(1e9),
    "hyperparameters.batch_rows": whole(1, 1 << 16),
    "hyperparameters.batch_tokens": whole(1, MAX_BATCH_TOKENS),
    "checkpoint_interval_steps": whole(1, MAX_STEPS),
    "max_checkpoints": whole(1, 10_000),
    "validation_interval_steps": whole(0, MAX_STEPS),
}
DEFAULTS: Mapping[str, int | float] = {
    "lora.rank": 16,
    "hyperparameters.num_epochs": 1,
    "hyperparameters.micro_batch_tokens": 4096,
    "hyperparameters.learning_rate": 2e-4,
    "hyperparameters.learning_rate_schedule": LEARNING_RATE_SCHEDULE_COSINE,
    "hyperparameters.max_grad_norm": 1.0,
    "checkpoint_interval_steps": 25,
    "max_checkpoints": 3,
}
"""Of fields whose default is not zero and follows from no other field."""

State = FineTuningJob.State
TRANSITIONS: Mapping[int, Sequence[int]] = {
    # FAILED: no worker could be told what to do.
    State.STATE_QUEUED: (State.STATE_PREPARING, State.STATE_CANCELLED, State.STATE_FAILED),
    State.STATE_PREPARING: (
        State.STATE_QUEUED,
        State.STATE_RUNNING,
        State.STATE_CANCELLING,
        State.STATE_CANCELLED,
        State.STATE_SUCCEEDED,
        State.STATE_FAILED,
    ),
    State.STATE_RUNNING: (
        State.STATE_QUEUED,
        State.STATE_CANCELLING,
        State.STATE_CANCELLED,
        State.STATE_SUCCEEDED,
        State.STATE_FAILED,
    ),
    # A worker may end its work, or fail, before it hears that it should stop.
    State.STATE_CANCELLING: (State.STATE_CANCELLED, State.STATE_SUCCEEDED, State.STATE_FAILED),
    State.STATE_CANCELLED: (),
    State.STATE_SUCCEEDED: (),
    State.STATE_FAILED: (),
}


def wrong_fields(*violations: FieldViolation) -> InvalidArgument:
    """Return the error for wrong fields; its message is their descriptions, which name the fields."""
    return InvalidArgument(
        "; ".join(violation.description for violation in violations),
        reason=violations[0].reason,
        violations=violations,
    )


def check_references(parent: str, job: FineTuningJob) -> None:
    """Raise InvalidArgument unless a new job names a model and a rendering of its project."""
    missing = [
        FieldViolation(
            field=f"{_ROOT}.{field}",
            description=f"{field} must name a {kind} of {parent}, got none",
            reason=Reason.FIELD_REQUIRED,
        )
        for field, kind, value in (
            ("base_model", "base model", job.base_model),
            ("rendering", "rendering", job.rendering),
        )
        if not value
    ]
    if missing:
        raise wrong_fields(*missing)
    MODEL.parse(job.base_model, field=f"{_ROOT}.base_model")
    RENDERING.parse(job.rendering, field=f"{_ROOT}.rendering")
    names.same_project(parent, job.base_model, f"{_ROOT}.base_model")
    names.same_project(parent, job.rendering, f"{_ROOT}.rendering")


def check_job(job: FineTuningJob) -> None:
    """Raise InvalidArgument that names every field of a new job that is not valid by itself."""
    violations = [
        *display_name_violations(job.display_name, f"{_ROOT}.display_name"),
        *label_violations(job.labels, f"{_ROOT}.labels"),
        *_text_violations(job),
        *limit_violations(job, LIMITS, _ROOT),
    ]
    if violations:
        raise wrong_fields(*violations)


def resolved(job: FineTuningJob) -> FineTuningJob:
    """Return a new job with every default filled in; it has neither name nor state yet."""
    filled = FineTuningJob()
    filled.CopyFrom(job)
    filled.ClearField("name")
    fill_defaults(filled, DEFAULTS)
    if not filled.lora.HasField("alpha"):
        filled.lora.alpha = _ALPHA_OVER_RANK * filled.lora.rank
    if filled.hyperparameters.WhichOneof("batch_size") is None:
        filled.hyperparameters.batch_tokens = 4096
    return filled


def taught_by(rendering: Rendering) -> Taught:
    """Return how a model that learns a rendering is taught."""
    return Taught(
        # A rendering made before it kept what rendered it says at least what it was given.
        chat_template=rendering.effective_chat_template or rendering.chat_template,
        template_date=rendering.template_date,
        prefix_token_ids=rendering.prefix_token_ids,
        stop_token_ids=rendering.stop_token_ids,
        tokenizer_digest=rendering.tokenizer_digest,
        rendering=rendering.name,
        rendering_digest=rendering.digest,
    )


def _text_violations(job: FineTuningJob) -> Iterator[FieldViolation]:
    if job.tuned_model_id:
        try:
            names.check_id(job.tuned_model_id, field="tuned_model_id")
        except InvalidArgument:
            yield _violation("tuned_model_id", names.ID_RULE, job.tuned_model_id)
    targets = job.lora.target_modules
    if len(targets) > MAX_TARGETS:
        yield _violation("lora.target_modules", f"at most {MAX_TARGETS} names", len(targets))
    if not all(targets):
        yield _violation("lora.target_modules", "names of modules", "")


def _violation(path: str, rule: str, value: object) -> FieldViolation:
    return FieldViolation(field=f"{_ROOT}.{path}", description=f"{path} must be {rule}, got {value!r}")
