"""What the workers that are there have the memory for: plans say it, and hopeless jobs are refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.training.conftest import Bench, lengths_of
from tests.training.jobs.test_fits import GPU, give_config, planned

from luthier.errors import FailedPrecondition, InvalidArgument, Reason
from luthier.v1.device_pb2 import DEVICE_KIND_GPU, Requirements
from luthier.v1.fine_tuning_job_pb2 import (
    SHARDING_FSDP2,
    DeviceClass,
    FineTuningJob,
    FullConfig,
    LoraConfig,
    RankRange,
)
from luthier.work.requirements import GIB, Equipment
from luthier.work.tasks import TaskKind
from luthier.work.workers import Worker

SMALL = Equipment(device="CPU", device_name="a processor", memory_bytes=2 * GIB, num_ranks=1)
LARGE = Equipment(device="CUDA", device_name="a GPU", memory_bytes=80 * GIB, num_ranks=1)


def worker(name: str, equipment: Equipment, *kinds: TaskKind) -> Worker:
    return Worker(worker_id=name, instance="1", kinds=kinds or (TaskKind.TRAIN,), equipment=equipment)


async def test_a_job_that_is_too_large_for_every_worker_is_refused_with_what_would_fit(bench: Bench) -> None:
    await give_config(bench)
    bench.crew.workers = [worker("a", SMALL), worker("b", Equipment(device="CPU", memory_bytes=GIB))]
    with pytest.raises(FailedPrecondition) as caught:
        await bench.create("one", full=FullConfig())
    error = caught.value
    assert error.reason == Reason.DOES_NOT_FIT
    assert error.metadata["memory_bytes"] == str(2 * GIB)
    assert int(error.metadata["peak_bytes"]) > 2 * GIB
    assert "a job must fit into the memory of a training worker that is there: at the least " in error.message
    assert "(sharding FSDP2), or start a worker with more" in error.message
    assert error.message.endswith("there are: a has CPU (a processor) with 2.0 GiB, b has CPU with 1.0 GiB")
    assert await bench.queue.claim("w@1", [TaskKind.TRAIN], 0.0) is None, "nothing was queued"


async def test_an_adapter_on_the_same_model_fits_the_same_worker(bench: Bench) -> None:
    await give_config(bench)
    bench.crew.workers = [worker("a", SMALL)]
    assert (await bench.create("one")).state == FineTuningJob.STATE_QUEUED


@pytest.mark.parametrize(
    "workers",
    [
        [],
        [worker("a", SMALL), worker("b", LARGE)],
        [worker("a", SMALL), worker("old", Equipment())],
        [worker("a", SMALL, TaskKind.REGISTER_MODEL)],
    ],
    ids=["none", "one that has it", "one that does not tell", "one of another kind"],
)
async def test_nothing_is_refused_where_a_worker_may_have_the_memory(
    bench: Bench, workers: list[Worker]
) -> None:
    await give_config(bench)
    bench.crew.workers = workers
    assert (await bench.create("one", full=FullConfig())).state == FineTuningJob.STATE_QUEUED


async def test_only_workers_that_the_job_could_be_given_to_count(bench: Bench) -> None:
    await give_config(bench)
    bench.crew.workers = [worker("a", SMALL), worker("b", LARGE)]
    on_cpu = Requirements(min_memory_bytes=GIB)
    assert await bench.create("any", full=FullConfig(), requirements=on_cpu)
    bench.crew.workers = [worker("a", SMALL)]
    on_gpu = Requirements(device=DEVICE_KIND_GPU)
    made = await bench.create("gpu", full=FullConfig(), requirements=on_gpu)
    assert made.state == FineTuningJob.STATE_QUEUED, "it waits for a GPU"


async def test_ranks_on_a_processor_share_its_memory(bench: Bench) -> None:
    await give_config(bench)
    alone = await planned(bench, full=FullConfig())
    memory = round(1.5 * alone.memory.peak_bytes)
    bench.crew.workers = [worker("a", Equipment(device="CPU", memory_bytes=memory, num_ranks=2))]
    assert await bench.create("one", full=FullConfig())
    with pytest.raises(FailedPrecondition) as caught:
        await bench.create("two", full=FullConfig(), ranks=RankRange(min_ranks=2))
    assert caught.value.reason == Reason.DOES_NOT_FIT
    bench.crew.workers = [worker("a", Equipment(device="CUDA", memory_bytes=memory, num_ranks=2))]
    assert await bench.create("three", full=FullConfig(), ranks=RankRange(min_ranks=2))


async def test_ranks_that_divide_a_model_are_counted_as_the_worker_has_them(bench: Bench) -> None:
    await give_config(bench)
    ranks = RankRange(min_ranks=2, max_ranks=8)
    two = await planned(bench, full=FullConfig(), sharding=SHARDING_FSDP2, ranks=ranks)
    memory = round(0.75 * two.memory.peak_bytes)
    few = Equipment(device="CUDA", memory_bytes=memory, num_ranks=2)
    bench.crew.workers = [worker("a", few)]
    with pytest.raises(FailedPrecondition) as caught:
        await bench.create("one", full=FullConfig(), sharding=SHARDING_FSDP2, ranks=ranks)
    assert caught.value.reason == Reason.DOES_NOT_FIT
    bench.crew.workers = [worker("a", few), worker("b", replace(few, num_ranks=8))]
    assert await bench.create("two", full=FullConfig(), sharding=SHARDING_FSDP2, ranks=ranks)


async def test_a_plan_says_that_no_worker_has_the_memory_and_its_figures_all_the_same(bench: Bench) -> None:
    await give_config(bench)
    bench.crew.workers = [worker("a", SMALL)]
    plan = await planned(bench, full=FullConfig())
    assert plan.memory.peak_bytes > 2 * GIB
    (warning,) = [text for text in plan.warnings if "no training worker that is there" in text]
    assert "an adapter, a smaller base model, or ranks that divide the model" in warning
    assert warning.endswith("there are: a has CPU (a processor) with 2.0 GiB")
    bench.crew.workers = [worker("a", LARGE)]
    assert not [text for text in (await planned(bench, full=FullConfig())).warnings if "worker" in text]


async def test_a_plan_for_a_device_that_is_named_is_of_that_device_alone(bench: Bench) -> None:
    await give_config(bench)
    bench.crew.workers = [worker("a", SMALL)]
    for device in (GPU, DeviceClass(kind=DeviceClass.KIND_CPU)):
        plan = await planned(bench, device, full=FullConfig())
        assert not [text for text in plan.warnings if "worker" in text]


async def test_the_length_of_rows_counts_where_it_is_known(bench: Bench) -> None:
    await give_config(bench)
    rendering = bench.add_rendering()
    shorter = await planned(bench)
    bench.know(rendering, lengths_of(20, 60), lengths_of(5, 10, first=20))
    longer = await planned(bench)
    fixed = longer.memory.peak_bytes - longer.memory.activations_bytes - longer.memory.logits_bytes
    assert longer.memory.peak_bytes > shorter.memory.peak_bytes
    bench.crew.workers = [worker("a", Equipment(device="CPU", memory_bytes=fixed))]
    with pytest.raises(FailedPrecondition, match=r"passes of 60 tokens with activation_checkpointing FULL"):
        await bench.create("one")


async def test_a_pattern_that_fits_no_module_is_refused_at_once(bench: Bench) -> None:
    await give_config(bench)
    with pytest.raises(InvalidArgument) as caught:
        await bench.create("one", lora=LoraConfig(rank_pattern={"nothing": 4}))
    assert caught.value.reason == Reason.MODULE_PATTERN_INVALID


async def test_a_model_that_does_not_say_its_sizes_is_not_judged(bench: Bench) -> None:
    bench.crew.workers = [worker("a", Equipment(device="CPU", memory_bytes=1))]
    assert await bench.create("one", full=FullConfig())
