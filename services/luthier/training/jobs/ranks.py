"""On how many ranks a job may be trained, how they share its model, and what its steps have work for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from luthier.errors import FieldViolation
from luthier.runtime.field_limits import LimitTable, whole
from luthier.training.jobs.methods import rendering_kind
from luthier.training.jobs.reinforcement import answers_per_row
from luthier.training.jobs.split_counts import num_teaching, statistics_of
from luthier.training.recipe_settings import is_divided, precision_of, ranks_of, states_of
from luthier.training.recipes.survey import Survey, require_ranks, require_rows, steps_with_idle_ranks
from luthier.v1.dataset_pb2 import SPLIT_TRAIN
from luthier.v1.fine_tuning_job_pb2 import FineTuningJob
from luthier.v1.rendering_pb2 import (
    RENDERING_KIND_PREFERENCE,
    RENDERING_KIND_PROMPT,
    RENDERING_KIND_UNPAIRED,
    Rendering,
    RenderingKind,
)

MAX_RANKS = 4096

_SHARED_OUT: Mapping[RenderingKind.ValueType, str] = {
    RENDERING_KIND_PREFERENCE: "pairs",
    RENDERING_KIND_PROMPT: "prompts",
    RENDERING_KIND_UNPAIRED: "answers",
}
"""What a step has of each kind of rendering, where it is not rows, that no two ranks share."""
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


def require_rows_for_ranks(job: FineTuningJob, renderings: Sequence[Rendering]) -> None:
    """Refuse a job, all its defaults filled in, of more least ranks than any step has rows to share out.

    It is seen by what its renderings, its own first, say of themselves, in no time: what depends on how long each row
    is is left to whoever has the lengths. With reinforcement it is prompts that ranks share; where they divide a model
    it is answers, as a rank that draws none holds its part of the weights.

    Raises:
        FailedPrecondition: TOO_MANY_RANKS.
    """
    chosen = job.hyperparameters
    splits = [statistics_of(rendering, SPLIT_TRAIN) for rendering in renderings]
    # Of either size of a step the one that is not chosen is 0.
    shortest = max(1, min(split.tokens.minimum for split in splits))
    most = chosen.batch_rows or chosen.batch_tokens // shortest
    if len(splits) == 1:  # of a mixture units come in again and again
        most = min(most, splits[0].num_units or num_teaching(splits[0]))
    what = _SHARED_OUT.get(rendering_kind(job), "rows")
    if job.HasField("reinforcement") and is_divided(job):
        most, what = most * answers_per_row(job), "answers"
    require_rows(most, ranks_of(job)[0], what)


def is_cut_for_ranks(job: FineTuningJob) -> bool:
    """Whether a plan has to know how many forward passes steps can be cut into."""
    return ranks_of(job)[1] > 1 and not job.HasField("reinforcement")


def require_work_for_ranks(job: FineTuningJob, found: Survey) -> None:
    """Refuse a job whose least ranks have no work in any step. Raises FailedPrecondition, TOO_MANY_RANKS.

    Its survey cut passes of an open size as small as rows allow. Of steps that were estimated the largest may not have
    been counted: there it is left to the run, as with reinforcement, whose passes are known once answers are drawn.
    """
    if found.totals is not None and not found.totals.num_counted_steps and is_cut_for_ranks(job):
        is_open = not job.hyperparameters.micro_batch_tokens
        require_ranks(found.totals, ranks_of(job)[0], is_open=is_open)


def rank_warnings(job: FineTuningJob, found: Survey) -> Iterator[str]:
    """Yield what to know of a job's most ranks before training."""
    most = ranks_of(job)[1]
    if found.totals is None or not is_cut_for_ranks(job):
        return
    idle = steps_with_idle_ranks(found.totals, most)
    if idle:
        smaller = "a smaller micro_batch_tokens or " if job.hyperparameters.micro_batch_tokens else ""
        yield (
            f"with {most} ranks {idle} of {found.totals.num_steps} steps leave some of them idle, as they have fewer "
            f"forward passes; {smaller}a larger batch makes more"
        )
