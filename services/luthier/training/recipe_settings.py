"""What recipes need of a job, as their own small values: the one place where they are filled from its message.

The service plans by it and the worker trains by it, so that both count the same steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from luthier.lm.kept import CHECKPOINTINGS, Checkpointing
from luthier.lm.precision import PRECISIONS, Precision
from luthier.training.recipes.batches import BatchSettings, shares_reached
from luthier.training.recipes.course import Selection
from luthier.training.recipes.mixture import Measure, Mixture
from luthier.training.recipes.schedule import RateCourse, Schedule, steps_of_ratio
from luthier.training.recipes.survey import Survey
from luthier.v1 import fine_tuning_job_pb2
from luthier.v1.base_precision_pb2 import BasePrecision
from luthier.v1.fine_tuning_job_pb2 import FineTuningJob, RenderingUse


def batch_settings(job: FineTuningJob) -> BatchSettings:
    """Return the part of a job, all defaults filled in, that decides which rows make which step."""
    chosen = job.hyperparameters
    return BatchSettings(
        seed=chosen.seed,
        num_epochs=chosen.num_epochs,
        max_steps=chosen.max_steps,
        batch_tokens=chosen.batch_tokens,
        batch_rows=chosen.batch_rows,
        micro_batch_tokens=chosen.micro_batch_tokens,
    )


def is_divided(job: FineTuningJob) -> bool:
    """Whether each rank of a job holds a part of the model."""
    return job.sharding == fine_tuning_job_pb2.SHARDING_FSDP2


def ranks_of(job: FineTuningJob) -> tuple[int, int]:
    """Return the least and the most ranks that a job may be trained on.

    One, where it says nothing; two, where they divide the model.
    """
    least = job.ranks.min_ranks or (2 if is_divided(job) else 1)
    return least, max(least, job.ranks.max_ranks)


def kept_of(chosen: fine_tuning_job_pb2.ActivationCheckpointing.ValueType) -> Checkpointing:
    """Return how much layers keep of a pass for its gradient; what is not said is NONE."""
    name = fine_tuning_job_pb2.ActivationCheckpointing.Name(chosen)
    return next((kept for kept in CHECKPOINTINGS if name.endswith(f"_{kept}")), "NONE")


def named_kept(kept: Checkpointing) -> fine_tuning_job_pb2.ActivationCheckpointing.ValueType:
    """Return how the API calls what layers keep."""
    return fine_tuning_job_pb2.ActivationCheckpointing.Value(f"ACTIVATION_CHECKPOINTING_{kept}")


def precision_of(chosen: BasePrecision.ValueType) -> Precision:
    """Return what a base model is held in; what is not said is BFLOAT16."""
    name = BasePrecision.Name(chosen)
    return next((one for one in PRECISIONS if name.endswith(f"_{one}")), "BFLOAT16")


def states_of(
    chosen: fine_tuning_job_pb2.OptimiserStates.ValueType,
) -> Literal["FLOAT32", "INT8", "OFFLOADED"]:
    """Return what the optimiser's moments are held in; what is not said is FLOAT32."""
    if chosen == fine_tuning_job_pb2.OPTIMISER_STATES_OFFLOADED:
        return "OFFLOADED"
    return "INT8" if chosen == fine_tuning_job_pb2.OPTIMISER_STATES_INT8 else "FLOAT32"


def rendering_names(job: FineTuningJob) -> tuple[str, ...]:
    """Return the renderings of a job, its own first."""
    return (job.rendering, *(mixed.rendering for mixed in job.mixed_renderings))


def measure_of(job: FineTuningJob) -> Measure:
    """Return what shares of renderings are of: what divides the loss of a step."""
    return "TOKENS" if job.WhichOneof("method") in (None, "supervised") else "UNITS"


def mixture_of(job: FineTuningJob, first_rows: Sequence[int]) -> Mixture | None:
    """Return the renderings that a job, all its defaults filled in, mixes; None where it has one.

    `first_rows` say where the rows of each begin, the job's own first.
    """
    if not job.mixed_renderings:
        return None
    return Mixture(
        names=rendering_names(job),
        first_rows=tuple(first_rows),
        shares=(job.rendering_share, *(mixed.share for mixed in job.mixed_renderings)),
        measure=measure_of(job),
    )


def renderings_used(found: Survey, mixture: Mixture | None, digests: Sequence[str]) -> list[RenderingUse]:
    """Return what all steps take of each rendering of a mixture; nothing without one.

    `digests` are those of the renderings. The steps were counted: `found.totals` is there.
    """
    if mixture is None:
        return []
    assert found.totals is not None, "the steps were counted"
    drawn = found.totals.drawn
    reached = shares_reached(drawn, mixture)
    return [
        RenderingUse(
            rendering=name,
            digest=digests[place],
            share=mixture.shares[place],
            reached_share=reached[place],
            num_train_rows=part.num_teaching_rows,
            num_validation_rows=part.num_validation_rows,
            num_rows=drawn[place].num_rows,
            num_tokens=drawn[place].num_tokens,
            num_supervised_tokens=drawn[place].num_supervised,
            num_epochs=drawn[place].num_rows / part.num_teaching_rows,
        )
        for place, (name, part) in enumerate(zip(mixture.names, (found, *found.mixed), strict=True))
    ]


def selection_of(job: FineTuningJob) -> Selection | None:
    """Return by what a job, all its defaults filled in, is judged; None where it is not."""
    if not job.HasField("selection"):
        return None
    chosen = job.selection
    is_higher = chosen.direction == fine_tuning_job_pb2.Selection.DIRECTION_HIGHER
    return Selection(
        metric=chosen.metric,
        direction="MAX" if is_higher else "MIN",
        min_delta=chosen.min_delta,
        patience=chosen.patience,
    )


def schedule_of(job: FineTuningJob, num_steps: int) -> Schedule:
    """Return the learning rate of a job, all its defaults filled in, that makes so many steps."""
    chosen = job.hyperparameters
    name = fine_tuning_job_pb2.LearningRateSchedule.Name(chosen.learning_rate_schedule)
    warmup_steps = chosen.warmup_steps or steps_of_ratio(chosen.warmup_ratio, num_steps)
    decay_steps = chosen.decay_steps or steps_of_ratio(chosen.decay_ratio, num_steps)
    return Schedule(
        peak=chosen.learning_rate,
        course=RateCourse(name.removeprefix("LEARNING_RATE_SCHEDULE_")),
        warmup_steps=warmup_steps,
        num_steps=num_steps,
        # What falls has risen before.
        decay_steps=min(decay_steps, max(0, num_steps - warmup_steps)),
    )
