"""What the base model of a job and its moments are held in: what may be said of that, and what follows from it."""

from __future__ import annotations

from collections.abc import Iterator

from luthier.errors import FieldViolation
from luthier.training.recipe_settings import precision_of, states_of
from luthier.v1.base_precision_pb2 import BASE_PRECISION_BFLOAT16, BASE_PRECISION_UNSPECIFIED
from luthier.v1.device_pb2 import DEVICE_KIND_CPU, DEVICE_KIND_GPU, DEVICE_KIND_UNSPECIFIED
from luthier.v1.fine_tuning_job_pb2 import FineTuningJob

FIELD = "fine_tuning_job.base_precision"
STATES_FIELD = "fine_tuning_job.hyperparameters.optimiser_states"


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


def states_violations(job: FineTuningJob) -> Iterator[FieldViolation]:
    """Yield what is wrong with where a job holds its moments: main memory is elsewhere for a GPU alone."""
    if states_of(job.hyperparameters.optimiser_states) != "OFFLOADED":
        return
    if not job.HasField("full"):
        yield FieldViolation(
            field=STATES_FIELD,
            description="must be unset, FLOAT32 or INT8 with lora, whose moments take little beside the model, got "
            "OFFLOADED; full trains all weights",
        )
    if job.requirements.device == DEVICE_KIND_CPU:
        yield FieldViolation(
            field="fine_tuning_job.requirements.device",
            description="must be unset or a GPU with optimiser_states OFFLOADED: a processor has no other memory to "
            "hold moments in; got CPU",
        )


def fill_states(job: FineTuningJob) -> None:
    """Have, in place, a job whose moments a GPU has not room for go to a worker that has one."""
    is_offloaded = states_of(job.hyperparameters.optimiser_states) == "OFFLOADED"
    if is_offloaded and job.requirements.device == DEVICE_KIND_UNSPECIFIED:
        job.requirements.device = DEVICE_KIND_GPU
