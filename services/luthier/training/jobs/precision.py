"""What the base model of a job is held in: what may be said of it, and what it is where nothing is."""

from __future__ import annotations

from collections.abc import Iterator

from luthier.errors import FieldViolation
from luthier.training.recipe_settings import precision_of
from luthier.v1.base_precision_pb2 import BASE_PRECISION_BFLOAT16, BASE_PRECISION_UNSPECIFIED
from luthier.v1.fine_tuning_job_pb2 import FineTuningJob

FIELD = "fine_tuning_job.base_precision"


def precision_violations(job: FineTuningJob) -> Iterator[FieldViolation]:
    """Yield what is wrong with what a job holds its base model in: weights that train are never quantised."""
    precision = precision_of(job.base_precision)
    if job.HasField("full") and precision != "BFLOAT16":
        yield FieldViolation(
            field=FIELD,
            description="must be unset or BFLOAT16 with full: weights that train are never quantised; train an adapter "
            f"(lora) beside a base model in {precision} instead; got {precision}",
        )


def fill_precision(job: FineTuningJob) -> None:
    """Fill in, in place, what the base model of an adapter is held in."""
    if not job.HasField("full") and job.base_precision == BASE_PRECISION_UNSPECIFIED:
        job.base_precision = BASE_PRECISION_BFLOAT16
