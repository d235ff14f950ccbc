"""Every method on a GPU: as on the processor within rounding, and the same bits after a break. Needs a GPU."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.training.worker.conftest import Site
from tests.training.worker.test_on_a_device import CASES, few_in_8_bits
from tests.training.worker.test_weights import ended

from luthier.training.worker.computing import computed
from luthier.training.worker.order import Desk, TrainEnd, TrainOrder
from luthier.v1.fine_tuning_job_pb2 import DETERMINISM_BITWISE, FineTuningJob
from luthier.work.context import TaskContext

__all__ = ["few_in_8_bits"]
# cuBLAS reads it when the GPU is opened.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use"),
    pytest.mark.usefixtures("few_in_8_bits"),
]
DRAWS = ("GRPO", "GRPO of all weights")
"""Methods whose second step depends on what was drawn in the first, so on its last bits."""


@pytest.fixture(autouse=True)
def _determinism_only_here() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(mode=False)


def compute_on_gpu(order: TrainOrder, desk: Desk, context: TaskContext) -> TrainEnd:
    return computed(order, desk, torch.device("cuda", 0))


async def prepared(site: Site, model_folder: Path, name: str) -> FineTuningJob:
    case = CASES[name]()
    case.give_rows(site)
    site.data.tokenizer_digest = (await site.register(model_folder)).tokenizer_digest
    return case.job


@pytest.mark.parametrize("name", sorted(CASES))
async def test_a_gpu_learns_what_a_processor_learns(site: Site, model_folder: Path, name: str) -> None:
    async with site.worker():
        wanted = await prepared(site, model_folder, name)
        there = await ended(site, "processor", wanted)
    async with site.worker(compute=compute_on_gpu):
        here = await ended(site, "gpu", wanted)
    assert "sm_" in here.run_record.device or "gfx" in here.run_record.device
    ours, theirs = await site.metrics(here.name), await site.metrics(there.name)
    assert len(ours) == len(theirs) == 2
    if name in DRAWS:
        assert ours[0]["sampler_trainer_gap"] < 0.05, "draws and updates are of the same weights"
        return
    for step in (0, 1):
        assert ours[step]["train_loss"] == pytest.approx(theirs[step]["train_loss"], rel=0.02, abs=0.02)
        assert ours[step]["grad_norm"] == pytest.approx(theirs[step]["grad_norm"], rel=0.1, abs=0.02)


@pytest.mark.parametrize(
    "name",
    [
        "an adapter with dropout and a trained embedding",
        "an adapter with DoRA beside NF4",
        "all weights",
        "all weights with moments in 8 bits",
        "DPO",
        "KTO",
    ],
)
async def test_a_run_that_is_stopped_ends_with_the_same_bits(
    site: Site, model_folder: Path, name: str
) -> None:
    async with site.worker(compute=compute_on_gpu):
        wanted = await prepared(site, model_folder, name)
        wanted.hyperparameters.max_steps = 9
        whole = await ended(site, "whole", wanted)
    assert whole.run_record.determinism == DETERMINISM_BITWISE, whole.run_record.best_effort_reason
    broken = await site.create_job("broken", wanted)
    stopping = asyncio.Event()
    async with site.worker(stopping, compute=compute_on_gpu):
        async for event in site.watch(broken.name):
            if event.WhichOneof("payload") == "checkpoint":
                break
        stopping.set()
    async with site.worker(compute=compute_on_gpu):
        again = await site.ended(broken.name)
    assert (again.state, again.num_attempts) == (FineTuningJob.STATE_SUCCEEDED, 2)
    assert await site.metrics(broken.name) == await site.metrics(whole.name)
    digests: list[Any] = [
        [(one.step, one.digest) for one in await site.checkpoints(name)] for name in (whole.name, broken.name)
    ]
    assert digests[0] == digests[1]
