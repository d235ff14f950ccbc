"""On how many ranks a job may be trained, how they share its model, and what its steps have work for."""

from __future__ import annotations

from collections.abc import Iterator

from luthier.errors import FieldViolation
from luthier.runtime.field_limits import LimitTable, whole
from luthier.training.recipe_settings import is_divided, precision_of, ranks_of, states_of
from luthier.training.recipes.survey import Survey, require_ranks, steps_with_idle_ranks
from luthier.v1.fine_tuning_job_pb2 import FineTuningJob

MAX_RANKS = 4096

LIMITS: LimitTable = {
    "ranks.min_ranks": whole(1, MAX_RANKS),
    "ranks.max_ranks": whole(1, MAX_RANKS),
}


def rank_violations(job: FineTuningJob) -> Iterator[FieldViolation]:
    """Yield what does not go together in the ranks of a new job, as it came."""
    divided = is_divided(job)
    said, most = job.ranks.min_ranks, job.ranks.max_ranks
    least = said or (2 if divided else 1)
    if divided and said == 1:
        yield FieldViolation(
            field="fine_tuning_job.ranks.min_ranks",
            description="must be at least 2 with sharding SHARDING_FSDP2, as one rank holds all of the model, got 1",
        )
    if most and most < least:
        yield FieldViolation(
            field="fine_tuning_job.ranks.max_ranks",
            description=f"must be at least min_ranks, {least}, got {most}",
        )
    if divided and job.lora.trained_modules:
        yield FieldViolation(
            field="fine_tuning_job.lora.trained_modules",
            description="must be empty with sharding SHARDING_FSDP2, which divides no weights that an adapter puts in "
            f"place of the model's, got {list(job.lora.trained_modules)}",
        )
    if divided:
        yield from _undivided(job)


def _undivided(job: FineTuningJob) -> Iterator[FieldViolation]:
    """Yield what ranks that divide a model cannot hold parts of yet."""
    if precision_of(job.base_precision) != "BFLOAT16":
        yield FieldViolation(
            field="fine_tuning_job.base_precision",
            description="must be BASE_PRECISION_BFLOAT16 with sharding SHARDING_FSDP2, which divides no quantised "
            f"weights, got BASE_PRECISION_{precision_of(job.base_precision)}",
        )
    if states_of(job.hyperparameters.optimiser_states) != "FLOAT32":
        yield FieldViolation(
            field="fine_tuning_job.hyperparameters.optimiser_states",
            description="must be OPTIMISER_STATES_FLOAT32 with sharding SHARDING_FSDP2, which divides no moments of 8 "
            "bits and none in main memory, got "
            f"OPTIMISER_STATES_{states_of(job.hyperparameters.optimiser_states)}",
        )


def fill_ranks(job: FineTuningJob) -> None:
    """Fill in, in place, the ranks of a job that says something of them."""
    if job.HasField("ranks") or is_divided(job):
        least, most = ranks_of(job)
        job.ranks.min_ranks, job.ranks.max_ranks = least, most


def require_work_for_ranks(job: FineTuningJob, found: Survey) -> None:
    """Refuse a job whose least ranks have no work in any step. Raises FailedPrecondition, TOO_MANY_RANKS.

    Of steps that were estimated the largest may not have been counted: there it is left to the run.
    """
    if found.totals is not None and not found.totals.num_counted_steps and _has_known_passes(job):
        require_ranks(found.totals, ranks_of(job)[0])


def _has_known_passes(job: FineTuningJob) -> bool:
    """Whether the passes of a job's steps are known before it runs.

    What reinforcement learns from in a step is known only once it is drawn; passes of an open size are cut so that each
    rank of the run has some.
    """
    return not job.HasField("reinforcement") and job.hyperparameters.micro_batch_tokens > 0


def rank_warnings(job: FineTuningJob, found: Survey) -> Iterator[str]:
    """Yield what to know of a job's most ranks before training."""
    most = ranks_of(job)[1]
    if found.totals is None or most == 1 or not _has_known_passes(job):
        return
    idle = steps_with_idle_ranks(found.totals, most)
    if idle:
        yield (
            f"with {most} ranks {idle} of {found.totals.num_steps} steps leave some of them idle, as they have fewer "
            "forward passes; a smaller micro_batch_tokens or a larger batch makes more"
        )
