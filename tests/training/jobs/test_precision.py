"""What a job may say of what its base model is held in, and who else is told of it."""

from __future__ import annotations

from typing import Any

import pytest
from tests.training.jobs.test_fits import give_config, planned
from tests.training.jobs.test_starts import ADAPTER, adapter_files, full_files, run

from luthier.errors import InvalidArgument
from luthier.v1.base_precision_pb2 import (
    BASE_PRECISION_BFLOAT16,
    BASE_PRECISION_INT8,
    BASE_PRECISION_NF4,
    BASE_PRECISION_UNSPECIFIED,
    BasePrecision,
)
from luthier.v1.device_pb2 import (
    DEVICE_KIND_CPU,
    DEVICE_KIND_CUDA,
    DEVICE_KIND_GPU,
    DEVICE_KIND_UNSPECIFIED,
    Requirements,
)
from luthier.v1.fine_tuning_job_pb2 import (
    OPTIMISER_STATES_FLOAT32,
    OPTIMISER_STATES_INT8,
    OPTIMISER_STATES_OFFLOADED,
    DeviceClass,
    FullConfig,
    Hyperparameters,
    OptimiserStates,
)

FIELD = "fine_tuning_job.base_precision"
ONE = "projects/default/fineTuningJobs/one"


@pytest.mark.parametrize("name", ["INT8", "NF4"])
async def test_weights_that_train_are_never_quantised(bench: Any, name: str) -> None:
    precision = BasePrecision.Value(f"BASE_PRECISION_{name}")
    with pytest.raises(InvalidArgument) as caught:
        await bench.plan(full=FullConfig(), base_precision=precision)
    assert [violation.field for violation in caught.value.violations] == [FIELD]
    assert caught.value.message == (
        f"{FIELD}: must be unset or BFLOAT16 with full: weights that train are never quantised; train an adapter "
        f"(lora) beside a base model in {name} instead; got {name}"
    )
    await bench.plan(full=FullConfig(), base_precision=BASE_PRECISION_BFLOAT16)


async def test_weights_of_a_checkpoint_that_is_gone_on_with_are_never_quantised(bench: Any) -> None:
    await run(bench, "one", await full_files(bench), full=FullConfig())
    start = f"{ONE}/checkpoints/step-5"
    with pytest.raises(InvalidArgument, match=f"{FIELD}: must be unset or BFLOAT16 with full"):
        await bench.create("two", base_model="", start_from=start, base_precision=BASE_PRECISION_NF4)
    assert (await bench.create("two", base_model="", start_from=start)).HasField("full")


async def test_an_adapter_without_a_word_is_trained_beside_bfloat16(bench: Any) -> None:
    assert (await bench.plan()).resolved_job.base_precision == BASE_PRECISION_BFLOAT16
    assert (await bench.plan(full=FullConfig())).resolved_job.base_precision == BASE_PRECISION_UNSPECIFIED


@pytest.mark.parametrize("start", [ADAPTER, f"{ONE}/checkpoints/step-5"])
async def test_what_goes_on_stays_beside_what_it_began_beside_unless_it_says_else(
    bench: Any, start: str
) -> None:
    files = await adapter_files(bench)
    await run(bench, "one", files, tuned_model_id="adapter", base_precision=BASE_PRECISION_NF4)
    assert (await bench.model(ADAPTER)).base_precision == BASE_PRECISION_NF4
    same = await bench.create("two", base_model="", start_from=start)
    other = await bench.create("three", base_model="", start_from=start, base_precision=BASE_PRECISION_INT8)
    assert (same.base_precision, other.base_precision) == (BASE_PRECISION_NF4, BASE_PRECISION_INT8)


async def test_plans_count_what_the_base_model_is_held_in(bench: Any) -> None:
    await give_config(bench)
    plain, eight, four = [
        await planned(bench, base_precision=one)
        for one in (BASE_PRECISION_UNSPECIFIED, BASE_PRECISION_INT8, BASE_PRECISION_NF4)
    ]
    products, words = 16 * (1024 * 1024 * 3 + 3 * 1024 * 2816), 2 * 32_000 * 1024
    rest = plain.memory.weights_bytes - 2 * products
    assert rest == 2 * (words + 33 * 1024)
    outputs = 16 * (1024 * 2 + 512 * 2 + 2816 * 2 + 1024)
    assert eight.memory.weights_bytes == rest + products + 5 * outputs
    assert four.memory.weights_bytes - rest == pytest.approx(0.516 * products, rel=0.001)
    others = [plan.memory.peak_bytes - plan.memory.weights_bytes for plan in (plain, eight, four)]
    assert others[0] == others[1] == others[2]
    assert plain.total_seconds < eight.total_seconds
    assert plain.total_seconds < four.total_seconds < 1.5 * plain.total_seconds


def holding(states: OptimiserStates.ValueType) -> Hyperparameters:
    return Hyperparameters(optimiser_states=states)


async def test_a_job_whose_moments_are_in_main_memory_requires_a_gpu(bench: Any) -> None:
    offloaded = holding(OPTIMISER_STATES_OFFLOADED)
    job = await bench.create("one", full=FullConfig(), hyperparameters=offloaded)
    assert job.requirements.device == DEVICE_KIND_GPU
    cuda = Requirements(device=DEVICE_KIND_CUDA)
    job = await bench.create("two", full=FullConfig(), hyperparameters=offloaded, requirements=cuda)
    assert job.requirements.device == DEVICE_KIND_CUDA
    plain = await bench.plan(full=FullConfig(), hyperparameters=holding(OPTIMISER_STATES_FLOAT32))
    assert plain.resolved_job.requirements.device == DEVICE_KIND_UNSPECIFIED


async def test_moments_are_in_main_memory_beside_a_gpu_and_of_all_weights_alone(bench: Any) -> None:
    with pytest.raises(InvalidArgument) as caught:
        await bench.plan(
            hyperparameters=holding(OPTIMISER_STATES_OFFLOADED),
            requirements=Requirements(device=DEVICE_KIND_CPU),
        )
    assert caught.value.message == (
        "fine_tuning_job.hyperparameters.optimiser_states: must be unset, FLOAT32 or INT8 with lora, whose moments "
        "take little beside the model, got OFFLOADED; full trains all weights; fine_tuning_job.requirements.device: "
        "must be unset or a GPU with optimiser_states OFFLOADED: a processor has no other memory to hold moments in; "
        "got CPU"
    )


async def test_plans_count_moments_that_are_in_main_memory(bench: Any) -> None:
    await give_config(bench)
    device = DeviceClass(kind=DeviceClass.KIND_GPU)
    plain, less = [
        await planned(bench, device, full=FullConfig(), hyperparameters=holding(states))
        for states in (OPTIMISER_STATES_FLOAT32, OPTIMISER_STATES_OFFLOADED)
    ]
    num_weights = plain.memory.gradients_bytes // 4
    assert plain.memory.optimiser_bytes == 12 * num_weights
    assert less.memory.optimiser_bytes == 4 * num_weights + 8 * 32_000 * 1024


async def test_plans_count_moments_of_8_bits(bench: Any) -> None:
    """Of all but the norms, which are small: a code for each of both, and a scale of four bytes for 256."""
    await give_config(bench)

    async def taken(states: OptimiserStates.ValueType) -> int:
        said = Hyperparameters(optimiser_states=states)
        found: int = (await planned(bench, full=FullConfig(), hyperparameters=said)).memory.optimiser_bytes
        return found

    norms = 33 * 1024
    matrices = 16 * (1024 * 1024 * 3 + 3 * 1024 * 2816) + 2 * 32_000 * 1024
    masters = 4 * (matrices + norms)
    assert await taken(OPTIMISER_STATES_FLOAT32) == masters + 8 * (matrices + norms)
    assert await taken(OPTIMISER_STATES_INT8) == masters + 8 * norms + 2 * (matrices + 4 * matrices // 256)
