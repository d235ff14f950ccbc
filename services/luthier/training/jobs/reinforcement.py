"""How reinforcement jobs are trained: limits and defaults of their method, and what does not go together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from luthier.errors import FieldViolation, Reason
from luthier.grading.checks import grader_violations
from luthier.runtime.field_limits import (
    Limit,
    LimitTable,
    fill_defaults,
    not_negative,
    positive,
    required,
    under,
    whole,
)
from luthier.v1.fine_tuning_job_pb2 import FineTuningJob, ReinforcementConfig

MAX_NEW_TOKENS = 32_768
MAX_STEP_ROLLOUTS = 1 << 14
"""Answers that a step may draw: they are graded together, and kept in one file."""
MAX_CHECKPOINT_INTERVAL = 1000
"""Steps whose answers a resumed attempt is told of at once."""
_NUM_SAMPLES = 8
_BATCH_ROWS = 16
_NAME = "reinforcement"
GRADER_FIELD = f"fine_tuning_job.{_NAME}.grader"

LIMITS: LimitTable = under(
    _NAME,
    {
        "grader": required("must be a grader"),
        "num_samples": (
            whole(1, 64),
            Limit(
                rule="must be at least 2: the answer of a group of one has nothing to be compared with, its advantage "
                "is 0",
                allows=lambda value: value >= 2,
                reason=Reason.GROUP_TOO_SMALL,
            ),
        ),
        "max_new_tokens": whole(1, MAX_NEW_TOKENS),
        "temperature": positive(2.0),
        "top_p": (
            positive(1.0),
            Limit(
                rule="must be 1: of answers drawn from a part of the probabilities, ratios to the sampler are biased",
                allows=lambda value: value == 1,
                reason=Reason.SAMPLING_BIASED,
            ),
        ),
        "clip_low": Limit(rule="must be above 0 and below 1", allows=lambda value: 0 < value < 1),
        "clip_high": positive(1e6),
        "kl_weight": not_negative(1e6),
        "max_grader_errors": whole(1, 1_000_000),
    },
)
DEFAULTS: Mapping[str, int | float] = {
    "num_samples": _NUM_SAMPLES,
    "max_new_tokens": 256,
    "temperature": 1.0,
    "top_p": 1.0,
    "clip_low": 0.2,
    "clip_high": 0.28,
    "normaliser": ReinforcementConfig.NORMALISER_TOKENS,
    "max_grader_errors": 64,
}


def fill_reinforcement(job: FineTuningJob) -> None:
    """Fill in, in place, what a job of this method leaves unsaid of it, and how many prompts make a step."""
    fill_defaults(job.reinforcement, DEFAULTS)
    fill_defaults(job.hyperparameters, {"batch_rows": _BATCH_ROWS})


def reinforcement_violations(job: FineTuningJob) -> Iterator[FieldViolation]:
    """Yield what does not go together in a new job of this method, as it came."""
    wanted, steers = job.reinforcement, job.hyperparameters
    if wanted.HasField("grader"):
        yield from grader_violations(wanted.grader, GRADER_FIELD)
    if steers.HasField("batch_tokens"):
        yield _violation(
            "hyperparameters.batch_tokens",
            "must be unset with reinforcement, as it is not known how long answers will be; set batch_rows, the "
            f"prompts of a step, got {steers.batch_tokens}",
        )
    num_rows, num_samples = steers.batch_rows or _BATCH_ROWS, wanted.num_samples or _NUM_SAMPLES
    if num_rows * num_samples > MAX_STEP_ROLLOUTS:
        yield _violation(
            "hyperparameters.batch_rows",
            f"must be at most {MAX_STEP_ROLLOUTS // num_samples} with num_samples {num_samples}, as a step may draw "
            f"{MAX_STEP_ROLLOUTS} answers, got {num_rows}",
        )
    if job.lora.dropout:
        yield _violation(
            "lora.dropout",
            "must be 0 with reinforcement, as answers are drawn without dropout: what is learnt would be another "
            f"model's, got {job.lora.dropout:g}",
        )
    if job.checkpoint_interval_steps > MAX_CHECKPOINT_INTERVAL:
        yield _violation(
            "checkpoint_interval_steps",
            f"must be at most {MAX_CHECKPOINT_INTERVAL} with reinforcement, as a resumed job is told of all that was "
            f"drawn since its checkpoint, got {job.checkpoint_interval_steps}",
        )


def answer_tokens(job: FineTuningJob) -> int:
    """Return how long an answer that is drawn to a row may be; 0 where none is."""
    return job.reinforcement.max_new_tokens if job.HasField("reinforcement") else 0


def answers_per_row(job: FineTuningJob) -> int:
    """Return how often a row goes through the model in a pass over the rows."""
    return job.reinforcement.num_samples if job.HasField("reinforcement") else 1


def _violation(field: str, description: str) -> FieldViolation:
    return FieldViolation(field=f"fine_tuning_job.{field}", description=description)
