"""What jobs may be: defaults, limits, and which state follows which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from luthier.runtime import names
from luthier.runtime.field_limits import (
    LimitTable,
    count,
    demanded,
    fill_defaults,
    limit_violations,
    not_negative,
    positive,
    refuse,
    required,
    under,
    whole,
)
from luthier.runtime.labels import DISPLAY_NAME, label_violations
from luthier.runtime.result_limits import FILE
from luthier.runtime.webhook_limits import LIMITS as WEBHOOK_LIMITS
from luthier.training.jobs.adaptation import LIMITS as ADAPTATION_LIMITS
from luthier.training.jobs.adaptation import lora_violations
from luthier.training.jobs.methods import LIMITS as METHOD_LIMITS
from luthier.training.jobs.methods import fill_method, method_violations
from luthier.training.jobs.mixing import LIMITS as MIXING_LIMITS
from luthier.training.jobs.mixing import fill_shares, mixture_violations
from luthier.training.jobs.precision import (
    fill_precision,
    fill_states,
    precision_violations,
    states_violations,
)
from luthier.training.jobs.ranks import LIMITS as RANK_LIMITS
from luthier.training.jobs.ranks import fill_ranks, rank_violations
from luthier.training.names import MODEL, RENDERING, WEIGHTS
from luthier.v1.fine_tuning_job_pb2 import LEARNING_RATE_SCHEDULE_COSINE, FineTuningJob
from luthier.v1.model_pb2 import Taught
from luthier.v1.rendering_pb2 import Rendering

MAX_STEPS = 10_000_000
MAX_BATCH_TOKENS = 1 << 24
MAX_MEMORY_BYTES = 1 << 50
MAX_FILES = 1000
MAX_METRICS = 10_000
_ROOT = "fine_tuning_job"
_ALPHA_OVER_RANK = 2.0

# Far beyond any use; what float32 cannot hold would stop the worker instead of the caller.
LIMITS: LimitTable = {
    "display_name": DISPLAY_NAME,
    "tuned_model_id": names.ID_LIMIT,
    **ADAPTATION_LIMITS,
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
    "requirements.min_memory_bytes": whole(0, MAX_MEMORY_BYTES),
    **METHOD_LIMITS,
    **MIXING_LIMITS,
    **RANK_LIMITS,
    **WEBHOOK_LIMITS,
}
_STARTED_REFERENCES: LimitTable = {"rendering": required("must name a rendering")}
REFERENCES: LimitTable = {
    "base_model": required("must name a base model, or start_from what to go on with"),
    **_STARTED_REFERENCES,
}
RESULT_LIMITS: LimitTable = {
    "files": count(MAX_FILES, "files", least=1),
    **under("files[]", FILE),
    "step": demanded(whole(1, MAX_STEPS)),
    "metrics": count(MAX_METRICS, "metrics"),
}
"""What a worker may say of a job that it ran."""
DEFAULTS: Mapping[str, int | float] = {
    "hyperparameters.num_epochs": 1,
    "hyperparameters.learning_rate_schedule": LEARNING_RATE_SCHEDULE_COSINE,
    "hyperparameters.max_grad_norm": 1.0,
    "checkpoint_interval_steps": 25,
    "max_checkpoints": 3,
}
"""Of fields whose default is not zero and follows from no other field."""

State = FineTuningJob.State
TRANSITIONS: Mapping[int, Sequence[int]] = {
    # FAILED: no worker could be told what to do.
    State.STATE_QUEUED: (
        State.STATE_PREPARING,
        State.STATE_PAUSED,
        State.STATE_CANCELLED,
        State.STATE_FAILED,
    ),
    State.STATE_PREPARING: (
        State.STATE_QUEUED,
        State.STATE_RUNNING,
        State.STATE_PAUSING,
        State.STATE_CANCELLING,
        State.STATE_CANCELLED,
        State.STATE_SUCCEEDED,
        State.STATE_FAILED,
    ),
    State.STATE_RUNNING: (
        State.STATE_QUEUED,
        State.STATE_PAUSING,
        State.STATE_CANCELLING,
        State.STATE_CANCELLED,
        State.STATE_SUCCEEDED,
        State.STATE_FAILED,
    ),
    # A worker may end its work, or fail, before it hears that it should pause or stop.
    State.STATE_PAUSING: (
        State.STATE_PAUSED,
        State.STATE_CANCELLING,
        State.STATE_CANCELLED,
        State.STATE_SUCCEEDED,
        State.STATE_FAILED,
    ),
    State.STATE_PAUSED: (State.STATE_QUEUED, State.STATE_CANCELLED),
    State.STATE_CANCELLING: (State.STATE_CANCELLED, State.STATE_SUCCEEDED, State.STATE_FAILED),
    State.STATE_CANCELLED: (),
    State.STATE_SUCCEEDED: (),
    State.STATE_FAILED: (),
}


def check_references(job: FineTuningJob) -> None:
    """Raise InvalidArgument unless a new job names a rendering, and a model or what to begin from."""
    refuse(limit_violations(job, _STARTED_REFERENCES if job.start_from else REFERENCES, _ROOT))
    if job.start_from:
        WEIGHTS.parse(job.start_from, field=f"{_ROOT}.start_from")
    if job.base_model:
        MODEL.parse(job.base_model, field=f"{_ROOT}.base_model")
    RENDERING.parse(job.rendering, field=f"{_ROOT}.rendering")
    for number, mixed in enumerate(job.mixed_renderings):
        RENDERING.parse(mixed.rendering, field=f"{_ROOT}.mixed_renderings[{number}].rendering")


def check_job(job: FineTuningJob) -> None:
    """Raise InvalidArgument that names every field of a new job that is not valid by itself."""
    refuse(
        [
            *limit_violations(job, LIMITS, _ROOT),
            *lora_violations(job),
            *method_violations(job),
            *mixture_violations(job),
            *rank_violations(job),
            *precision_violations(job),
            *states_violations(job),
            *label_violations(job.labels, f"{_ROOT}.labels"),
        ]
    )


def resolved(job: FineTuningJob) -> FineTuningJob:
    """Return a new job with every default filled in; it has neither name nor state yet."""
    filled = FineTuningJob()
    filled.CopyFrom(job)
    filled.ClearField("name")
    fill_defaults(filled, DEFAULTS)
    fill_method(filled)
    fill_shares(filled)
    fill_ranks(filled)
    fill_precision(filled)
    fill_states(filled)
    if not filled.HasField("full"):
        fill_defaults(filled, {"lora.rank": 16})
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
