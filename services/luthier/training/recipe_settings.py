"""What recipes need of a job, as their own small values: the one place where they are filled from its message.

The service plans by it and the worker trains by it, so that both count the same steps.
"""

from __future__ import annotations

from luthier.training.recipes.batches import BatchSettings
from luthier.training.recipes.course import Selection
from luthier.training.recipes.schedule import RateCourse, Schedule, steps_of_ratio
from luthier.v1 import fine_tuning_job_pb2
from luthier.v1.fine_tuning_job_pb2 import FineTuningJob


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
