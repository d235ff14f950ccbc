"""What a planned job takes on a class of devices: memory, time, and the passes that would be chosen there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import msgspec

from luthier.errors import DataLoss, FailedPrecondition, InvalidArgument, Reason
from luthier.kernels.dispatch import Isa, current_isa
from luthier.lm.shape import ModelShape, shape_of
from luthier.runtime.field_limits import LimitTable, limit_violations, not_negative, refuse, whole
from luthier.storage.blobs import BlobStore
from luthier.training.fitting import (
    Fit,
    Rows,
    fits_of,
    memory_message,
    rows_of,
    trained_of,
    what_would,
    work_of,
)
from luthier.training.jobs.reward_models import RewardModel
from luthier.training.jobs.split_counts import statistics_of
from luthier.training.recipe_settings import is_divided, named_kept, precision_of, ranks_of
from luthier.training.recipes.batches import PlanTotals
from luthier.training.recipes.footprint import Place, Speed, Trained, seconds
from luthier.training.recipes.survey import Survey
from luthier.training.weights import StoredModel
from luthier.v1.dataset_pb2 import SPLIT_TRAIN, SPLIT_VALIDATION
from luthier.v1.fine_tuning_job_pb2 import DeviceClass, FineTuningJob, FineTuningPlan
from luthier.v1.model_pb2 import Model
from luthier.v1.rendering_pb2 import Rendering
from luthier.work.machine import num_cores

CONFIG_NAME = "config.json"
_MAX_CONFIG_BYTES = 1 << 20
_ELEMENT = 2
_CORE: Mapping[Isa, Speed] = {
    "plain": Speed(operations=17e9, trained_head=6e9, bytes=14e9, moves=20.0),
    "avx2": Speed(operations=65e9, trained_head=55e9, bytes=14e9, moves=20.0),
    "avx512": Speed(operations=75e9, trained_head=40e9, bytes=14e9, moves=20.0),
    "avx512_bf16": Speed(operations=75e9, trained_head=40e9, bytes=14e9, moves=20.0),
    "amx_bf16": Speed(operations=700e9, trained_head=60e9, bytes=14e9, moves=20.0),
}
"""What a core reaches in training's products, and moving bytes, by its instruction set (benchmarks/calibration.py)."""
_PEAK_SHARE = 0.4
"""Of a GPU's peak that training reaches: 35 % of an H100's were measured at 8B, others report 40 to 50 %."""
_OPERATIONS_A_BYTE = 250.0
"""Of GPUs' peak in products to that of their memory: an A100 has 156, an H100 295, an MI300X 246."""
DEVICE_LIMITS: LimitTable = {
    "memory_bytes": whole(0, 1 << 50),
    "operations_per_second": not_negative(1e20),
}


async def shape_in(blobs: BlobStore, model: StoredModel) -> ModelShape | None:
    """Return the sizes of a stored model with all its weights; None where its files do not say them.

    Raises:
        DataLoss: its `config.json` is not what was stored.
    """
    file = next((one for one in model.private.files if one.path == CONFIG_NAME), None)
    if file is None or file.size_bytes > _MAX_CONFIG_BYTES:
        return None
    text = await blobs.read_bytes(file.sha256)
    try:
        config: dict[str, Any] = msgspec.json.decode(text, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise DataLoss(f"{CONFIG_NAME} of a stored model cannot be read: {error}") from error
    try:
        return shape_of(config)
    except InvalidArgument:
        return None


def check_device(device: DeviceClass) -> None:
    """Raise InvalidArgument that names every field of a class of devices that is beyond its limit."""
    refuse(limit_violations(device, DEVICE_LIMITS, "device"))


def trained_in(job: FineTuningJob, shape: ModelShape, rewards: Sequence[RewardModel]) -> Trained:
    """Return what a job trains, beside the reward models that its worker holds.

    Raises:
        InvalidArgument: a pattern of ranks fits no module (MODULE_PATTERN_INVALID).
    """
    return trained_of(job, shape, _bytes_beside(job, rewards))


def counted_rows(job: FineTuningJob, found: Survey, renderings: Sequence[Rendering]) -> Rows:
    """Return what is known of a job's rows, whose steps were counted, for the most ranks that it takes."""
    assert found.totals is not None, "the steps were counted"
    longest = max(part.longest.num_tokens for part in (found, *found.mixed) if part.longest is not None)
    held = sum(
        statistics_of(rendering, split).tokens.sum
        for rendering in renderings
        for split in (SPLIT_TRAIN, SPLIT_VALIDATION)
    )
    return rows_of(job, found.totals, longest, held, ranks_of(job)[1])


def add_fit(
    plan: FineTuningPlan, device: DeviceClass, trained: Trained, rows: Rows, totals: PlanTotals
) -> None:
    """Say in a plan what its job takes on a device, which passes fit there, and how long its steps take.

    Raises:
        FailedPrecondition: DOES_NOT_FIT, with what would.
    """
    job = plan.resolved_job
    is_gpu = device.kind == DeviceClass.KIND_GPU
    place: Place = "GPU" if is_gpu else "CPU"
    fit = _chosen(job, trained, rows, place, device)
    plan.memory.CopyFrom(memory_message(fit.footprint))
    plan.micro_batch_tokens, plan.activation_checkpointing = fit.micro_batch_tokens, named_kept(fit.kept)
    plan.device.CopyFrom(device)
    plan.device.kind = DeviceClass.KIND_GPU if is_gpu else DeviceClass.KIND_CPU
    speed = speed_of(device)
    if speed is not None:
        plan.device.operations_per_second = device.operations_per_second or speed.operations
        plan.total_seconds = seconds(trained, work_of(job, totals), fit.kept, speed)
        plan.seconds_per_step = plan.total_seconds / totals.num_steps


def _chosen(job: FineTuningJob, trained: Trained, rows: Rows, place: Place, device: DeviceClass) -> Fit:
    limit = device.memory_bytes
    every = list(fits_of(job, trained, rows, place, limit))
    chosen = next((one for one in every if one.fits), None)
    if chosen is not None:
        return chosen
    least = every[-1]
    raise FailedPrecondition(
        f"a job must fit into its device with a tenth to spare: {least.words}; "
        f"{what_would(job, trained, rows, place, limit)}",
        reason=Reason.DOES_NOT_FIT,
        metadata={
            "peak_bytes": str(least.footprint.peak),
            "memory_bytes": str(limit),
            "micro_batch_tokens": str(least.micro_batch_tokens),
        },
    )


def processor_speed(isa: Isa, cores: int) -> Speed:
    """Return what so many cores with an instruction set reach together."""
    core = _CORE[isa]
    return Speed(
        operations=cores * core.operations,
        trained_head=cores * core.trained_head,
        bytes=cores * core.bytes,
        moves=core.moves,
    )


def speed_of(device: DeviceClass) -> Speed | None:
    """Return what a plan counts on; None of a GPU whose operations a second are not said.

    A processor of which nothing is said is this machine's, on which workers run where nobody has put them elsewhere.
    """
    said = device.operations_per_second
    if device.kind != DeviceClass.KIND_GPU:
        here = processor_speed(current_isa(), num_cores())
        return _at_rate(here, said) if said else here
    if not said:
        return None
    reached = _PEAK_SHARE * said
    return Speed(
        operations=reached, trained_head=reached, bytes=said / _OPERATIONS_A_BYTE, makes_numbers=True
    )


def _at_rate(speed: Speed, operations: float) -> Speed:
    """Return a processor's speed with another rate of products; memory is as fast as it was."""
    head = speed.trained_head * operations / speed.operations
    return replace(speed, operations=operations, trained_head=head)


def _bytes_beside(job: FineTuningJob, rewards: Sequence[RewardModel]) -> int:
    """Return the bytes of reward models that do not share the weights of the model that trains."""
    apart: dict[tuple[str, int], int] = {}
    for one in rewards:
        message: Model = one.model.message
        is_whole = not job.HasField("full") and not is_divided(job)
        is_held_alike = precision_of(message.base_precision) == precision_of(job.base_precision)
        shares = message.base_model == job.base_model and is_whole and is_held_alike
        if not shares:
            # Adapters of one base share its weights.
            apart[one.whole.uid, message.base_precision] = _ELEMENT * one.whole.message.num_parameters
    return sum(apart.values())
