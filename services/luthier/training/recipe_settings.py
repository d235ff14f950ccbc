"""What recipes need of a job, as their own small values: the one place where they are filled from its message.

The service plans by it and the worker trains by it, so that both count the same steps.
"""

from __future__ import annotations

from luthier.training.recipes.batches import BatchSettings
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
