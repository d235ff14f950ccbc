"""Plans say what memory and time a job takes on a device, and refuse what does not fit."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any, get_args

import pytest
from tests.training.conftest import Bench, lengths_of
from tests.training.jobs.rollouts import reinforcement
from tests.training.jobs.test_reinforcement import know, prompts

from luthier.errors import DataLoss, FailedPrecondition, InvalidArgument, Reason
from luthier.kernels.dispatch import Isa
from luthier.lm.shape import shape_of
from luthier.training.fitting import trained_of
from luthier.training.jobs import fits
from luthier.training.models import repository
from luthier.training.recipes.footprint import Work, seconds
from luthier.v1.fine_tuning_job_pb2 import (
    ACTIVATION_CHECKPOINTING_FULL,
    ACTIVATION_CHECKPOINTING_NONE,
    SHARDING_FSDP2,
    SHARDING_REPLICATED,
    DeviceClass,
    FineTuningPlan,
    FullConfig,
    Hyperparameters,
    LoraConfig,
    RankRange,
)
from luthier.v1.model_pb2 import ModelFile
from luthier.v1.training_service_pb2 import PlanFineTuningJobRequest

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32_000,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}
GPU = DeviceClass(kind=DeviceClass.KIND_GPU, memory_bytes=80 << 30, operations_per_second=989e12)


async def give_config(bench: Bench, text: str = json.dumps(CONFIG)) -> None:
    """Store the base model's `config.json`."""
    blob = await bench.blobs.put_bytes(text.encode())
    async with bench.database.transaction() as connection:
        stored = await bench.models.find_base(connection, bench.MODEL)
        private = stored.copy_private()
        private.files.append(ModelFile(path="config.json", sha256=blob.digest, size_bytes=blob.size_bytes))
        await repository.models().update(connection, stored, stored.copy(), private)


async def planned(bench: Bench, device: DeviceClass | None = None, **changes: Any) -> FineTuningPlan:
    request = PlanFineTuningJobRequest(
        parent=bench.PARENT, fine_tuning_job=bench.request(**changes), device=device
    )
    return await bench.jobs.plan(request)


async def test_a_plan_says_memory_and_time_of_a_processor_unasked(bench: Bench) -> None:
    await give_config(bench)
    plan = await planned(bench)
    found = plan.memory
    assert found.weights_bytes == 2 * (
        16 * (1024 * 1024 * 3 + 3 * 1024 * 2816) + 33 * 1024 + 2 * 32_000 * 1024
    )
    assert found.adapters_bytes == found.gradients_bytes == found.optimiser_bytes // 2 > 0
    assert found.activations_bytes > 0 < found.logits_bytes
    assert found.cache_bytes == 0 < found.runtime_bytes
    parts = [value for field, value in found.ListFields() if field.name != "peak_bytes"]
    assert found.peak_bytes == sum(parts)
    assert (plan.micro_batch_tokens, plan.activation_checkpointing) == (4096, ACTIVATION_CHECKPOINTING_NONE)
    assert plan.device.kind == DeviceClass.KIND_CPU
    assert plan.device.operations_per_second > 0
    assert plan.total_seconds == pytest.approx(plan.num_steps * plan.seconds_per_step)
    assert plan.resolved_job.hyperparameters.micro_batch_tokens == 0


async def test_a_plan_is_for_the_device_that_is_asked_for(bench: Bench) -> None:
    await give_config(bench)
    slow, fast = await planned(bench), await planned(bench, GPU)
    assert fast.total_seconds < slow.total_seconds / 100
    assert fast.device == GPU
    assert fast.micro_batch_tokens == 32_768
    unknown = await planned(bench, DeviceClass(kind=DeviceClass.KIND_GPU))
    assert unknown.total_seconds == unknown.seconds_per_step == 0
    assert unknown.memory == fast.memory
    twice = DeviceClass(
        kind=DeviceClass.KIND_CPU, operations_per_second=2 * slow.device.operations_per_second
    )
    assert slow.total_seconds / 2 < (await planned(bench, twice)).total_seconds < slow.total_seconds


async def test_a_plan_tells_the_time_that_the_calibrated_formula_comes_to(bench: Bench) -> None:
    """`benchmarks/calibration.py` compares that formula with runs: a plan gives it its rows, steps and device."""
    await give_config(bench)
    bench.add_rendering()
    device = DeviceClass(kind=DeviceClass.KIND_CPU, operations_per_second=1e12)
    plan = await planned(bench, device, hyperparameters=Hyperparameters(num_epochs=3))
    job, (row,) = plan.resolved_job, set(lengths_of(20, 10)[:1])
    num_rows = 3 * 20
    work = Work(
        num_tokens=num_rows * 10,
        num_scored=num_rows * row.num_supervised,
        num_seen=num_rows * sum(range(1, 11)),
        num_steps=plan.num_steps,
    )
    speed = fits.speed_of(device)
    assert speed is not None
    assert speed.operations == plan.device.operations_per_second == 1e12
    told = seconds(trained_of(job, shape_of(CONFIG)), work, "NONE", speed)
    assert plan.total_seconds == pytest.approx(told, rel=1e-9)
    assert plan.seconds_per_step == pytest.approx(told / plan.num_steps, rel=1e-9)
    assert plan.num_steps >= 1


async def test_a_processor_unasked_is_that_of_this_machine(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    await give_config(bench)
    plans: dict[tuple[Isa, int], FineTuningPlan] = {}
    machines: list[tuple[Isa, int]] = [("avx2", 1), ("avx2", 4), ("amx_bf16", 1)]
    for isa, cores in machines:
        monkeypatch.setattr(fits, "current_isa", lambda isa=isa: isa)
        monkeypatch.setattr(fits, "num_cores", lambda cores=cores: cores)
        plans[isa, cores] = await planned(bench)
        rate = fits.processor_speed(isa, cores).operations
        assert plans[isa, cores].device.operations_per_second == rate
    one, four, tiles = plans.values()
    assert four.total_seconds == pytest.approx(one.total_seconds / 4)
    assert tiles.total_seconds < one.total_seconds
    assert tiles.memory == one.memory


@pytest.mark.parametrize("isa", get_args(Isa))
def test_every_instruction_set_has_its_speed(isa: Isa) -> None:
    slowest = fits.processor_speed("plain", 1)
    speed = fits.processor_speed(isa, 2)
    assert speed.operations >= 2 * slowest.operations
    assert min(speed.trained_head, speed.bytes, speed.moves) > 0


def test_a_processor_of_another_rate_moves_bytes_no_faster() -> None:
    said = fits.speed_of(DeviceClass(operations_per_second=3e12))
    here = fits.speed_of(DeviceClass())
    assert said is not None
    assert here is not None
    assert (said.operations, said.bytes) == (3e12, here.bytes)
    assert said.trained_head / said.operations == pytest.approx(here.trained_head / here.operations)


@pytest.mark.parametrize(
    ("batch_rows", "micro_batch_tokens", "num_cached"),
    [(4, 0, 4 * 3 * 60), (16, 0, 16 * 3 * 60), (16, 60, 16 * 60)],
    ids=["a step", "a larger step", "sixteen passes of what is said"],
)
async def test_a_plan_of_reinforcement_counts_keys_and_values_of_answers(
    bench: Bench, batch_rows: int, micro_batch_tokens: int, num_cached: int
) -> None:
    """20 prompts of 10 tokens, with three answers of up to 50 to each."""
    await give_config(bench)
    know(bench, prompts(*[10] * 20))
    said = Hyperparameters(batch_rows=batch_rows, activation_checkpointing=ACTIVATION_CHECKPOINTING_FULL)
    if micro_batch_tokens:
        said.micro_batch_tokens = micro_batch_tokens
    method = reinforcement(num_samples=3, max_new_tokens=50)
    plan = await planned(bench, reinforcement=method, hyperparameters=said)
    found = plan.memory
    # Keys and values of 16 layers with 8 heads of 64, two bytes each.
    assert found.cache_bytes == 2 * 16 * 8 * 64 * 2 * num_cached
    lasting = found.weights_bytes + found.adapters_bytes + found.gradients_bytes + found.optimiser_bytes
    at_once = max(found.activations_bytes + found.logits_bytes, found.cache_bytes)
    assert found.peak_bytes == lasting + found.runtime_bytes + at_once
    speed = fits.speed_of(DeviceClass())
    assert speed is not None
    num_tokens, num_answered = 3 * 20 * 60, 3 * 20 * 50
    work = Work(
        num_tokens=num_tokens,
        num_scored=num_answered,
        num_seen=3 * 20 * sum(range(1, 61)),
        num_steps=plan.num_steps,
        num_drawn=num_answered,
    )
    what = trained_of(plan.resolved_job, shape_of(CONFIG))
    assert plan.total_seconds == pytest.approx(seconds(what, work, "FULL", speed), rel=1e-9)
    assert plan.total_seconds > 1.2 * seconds(what, replace(work, num_drawn=0), "FULL", speed)


async def test_all_weights_and_answers_that_are_drawn_take_more(bench: Bench) -> None:
    await give_config(bench)
    adapter, whole = await planned(bench), await planned(bench, full=FullConfig())
    assert whole.memory.peak_bytes > 5 * adapter.memory.peak_bytes - 4 * adapter.memory.runtime_bytes
    assert whole.memory.adapters_bytes == 0
    assert whole.memory.optimiser_bytes == 6 * whole.memory.weights_bytes


async def test_what_does_not_fit_is_refused_with_what_would(bench: Bench) -> None:
    await give_config(bench)
    small = DeviceClass(kind=DeviceClass.KIND_GPU, memory_bytes=3 << 30)
    with pytest.raises(FailedPrecondition, match="no pass would: it needs a device of at least") as caught:
        await planned(bench, small, full=FullConfig())
    assert caught.value.reason == Reason.DOES_NOT_FIT
    assert caught.value.metadata["memory_bytes"] == str(3 << 30)
    assert int(caught.value.metadata["peak_bytes"]) > 3 << 30
    assert (
        "an adapter, a smaller base model, or ranks that divide the model (sharding FSDP2)"
        in caught.value.message
    )
    fits = await planned(bench, small)
    assert fits.memory.peak_bytes <= 0.9 * (3 << 30)


async def test_what_a_job_says_is_refused_where_something_else_would_fit(bench: Bench) -> None:
    await give_config(bench)
    rendering = bench.add_rendering()
    bench.know(rendering, lengths_of(2000, 60), lengths_of(5, 60, first=2000))
    said = Hyperparameters(micro_batch_tokens=1 << 16, batch_rows=1000)
    everything = await planned(bench, hyperparameters=said)
    device = DeviceClass(memory_bytes=everything.memory.peak_bytes // 3)
    with pytest.raises(
        FailedPrecondition, match=r"micro_batch_tokens \d+ with activation_checkpointing"
    ) as caught:
        await planned(bench, device, hyperparameters=said)
    assert caught.value.reason == Reason.DOES_NOT_FIT
    left_open = await planned(bench, device, hyperparameters=Hyperparameters(batch_rows=1000))
    assert f"micro_batch_tokens {left_open.micro_batch_tokens} with" in caught.value.message


@pytest.mark.parametrize(
    ("device", "field"),
    [
        (DeviceClass(memory_bytes=-1), "device.memory_bytes"),
        (DeviceClass(operations_per_second=-1.0), "device.operations_per_second"),
        (DeviceClass(operations_per_second=1e30), "device.operations_per_second"),
    ],
)
async def test_a_device_beyond_its_limits_is_refused_by_name(
    bench: Bench, device: DeviceClass, field: str
) -> None:
    with pytest.raises(InvalidArgument) as caught:
        await planned(bench, device)
    assert [violation.field for violation in caught.value.violations] == [field]


@pytest.mark.parametrize(("target", "hint"), [("lm_head", "trained_modules"), ("q_prj", "'q_proj'")])
async def test_a_target_that_is_no_linear_layer_is_refused_by_plan_and_job(
    bench: Bench, target: str, hint: str
) -> None:
    await give_config(bench)
    for ask in (
        planned(bench, lora=LoraConfig(target_modules=[target])),
        bench.create("one", lora=LoraConfig(target_modules=["v_proj", target])),
    ):
        with pytest.raises(InvalidArgument, match=f"target '{target}' matches no linear layer") as caught:
            await ask
        assert caught.value.reason == Reason.MODULE_PATTERN_INVALID
        assert hint in caught.value.message


async def test_a_pattern_that_fits_no_module_is_refused_by_the_plan(bench: Bench) -> None:
    await give_config(bench)
    with pytest.raises(InvalidArgument) as caught:
        await planned(bench, lora=LoraConfig(rank_pattern={"nothing": 4}))
    assert caught.value.reason == Reason.MODULE_PATTERN_INVALID


async def test_a_model_that_does_not_say_its_sizes_has_no_figures(bench: Bench) -> None:
    plan = await planned(bench)
    assert not plan.HasField("memory")
    assert plan.num_steps > 0
    await give_config(bench, json.dumps({"architectures": ["LlamaForCausalLM"]}))
    assert not (await planned(bench)).HasField("memory")


async def test_a_broken_config_is_data_loss(bench: Bench) -> None:
    await give_config(bench, "{")
    with pytest.raises(DataLoss, match=r"config\.json of a stored model cannot be read"):
        await planned(bench)


async def test_ranks_that_divide_a_model_take_less_each(bench: Bench) -> None:
    """Counted for the least ranks of a job: a worker with no more may take it. Heaps have no holes there."""
    await give_config(bench)
    ranks = RankRange(min_ranks=4, max_ranks=64)
    whole, parts = [
        (await planned(bench, full=FullConfig(), ranks=ranks, sharding=sharding)).memory
        for sharding in (SHARDING_REPLICATED, SHARDING_FSDP2)
    ]
    assert parts.optimiser_bytes == whole.optimiser_bytes // 4
    assert parts.weights_bytes < whole.weights_bytes
    assert parts.activations_bytes < whole.activations_bytes
    assert parts.peak_bytes < whole.peak_bytes
