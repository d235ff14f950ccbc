"""Every method trains on whatever device it is given: no tensor is left behind on the processor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.device_spy import DeviceSpy
from tests.training.conftest import prompt_rows, rows_of_units
from tests.training.worker.conftest import Site, job_of
from tests.training.worker.test_reinforcement import reinforcement
from tests.training.worker.test_weights import ended

from luthier.kernels.tables import force_impl
from luthier.lm.quantise import _nearest_codes
from luthier.training.recipes import footprint
from luthier.training.worker.computing import computed
from luthier.training.worker.order import Desk, TrainEnd, TrainOrder
from luthier.v1.base_precision_pb2 import BASE_PRECISION_BFLOAT16, BASE_PRECISION_INT8, BASE_PRECISION_NF4
from luthier.v1.fine_tuning_job_pb2 import (
    OPTIMISER_STATES_INT8,
    FineTuningJob,
    FullConfig,
    LoraConfig,
    PreferenceConfig,
    RewardModelConfig,
)
from luthier.v1.rendering_pb2 import (
    RENDERING_KIND_PREFERENCE,
    RENDERING_KIND_PROMPT,
    RENDERING_KIND_UNPAIRED,
)
from luthier.work.context import TaskContext

Loss = PreferenceConfig.Loss


@pytest.fixture
def eager() -> Iterator[None]:
    """Take the plain formulas: the kernels for the processor have tensors of their own there.

    NF4's codes of every number are made once for a device: a spy must see it.
    """
    _nearest_codes.cache_clear()
    force_impl("eager")
    yield
    force_impl("auto")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A job, and the rows that it learns from; None: those that a site has."""

    job: FineTuningJob
    rows: list[Any] | None = None
    kind: Any = None

    def give_rows(self, site: Site) -> None:
        """Let a site's rendering have them."""
        if self.rows is not None:
            site.data.rows, site.data.kind = self.rows, self.kind


def supervised(*, full: bool = False, precision: Any = BASE_PRECISION_BFLOAT16, **lora: Any) -> Case:
    job = job_of(max_steps=2)
    job.base_precision = precision
    if full:
        job.full.CopyFrom(FullConfig())
    else:
        job.lora.MergeFrom(LoraConfig(**lora))
    return Case(job=job)


def in_8_bits() -> Case:
    """All weights, the moments of those of more than a thousand in 8 bits."""
    case = supervised(full=True)
    case.job.hyperparameters.optimiser_states = OPTIMISER_STATES_INT8
    return case


def preferred(loss: Any, *, full: bool = False) -> Case:
    job = job_of(batch_rows=6, batch_tokens=None, max_steps=2)
    job.preference.CopyFrom(PreferenceConfig(loss=loss))
    if full:
        job.full.CopyFrom(FullConfig())
    if loss == Loss.LOSS_KTO:
        half = rows_of_units(16, "desirable", "mismatched"), rows_of_units(16, "undesirable", "mismatched")
        return Case(job=job, rows=_joined(*half), kind=RENDERING_KIND_UNPAIRED)
    return Case(job=job, rows=rows_of_units(16, "chosen", "rejected"), kind=RENDERING_KIND_PREFERENCE)


def valued() -> Case:
    job = job_of(batch_rows=6, batch_tokens=None, max_steps=2)
    job.reward_model.CopyFrom(RewardModelConfig())
    return Case(job=job, rows=rows_of_units(16, "chosen", "rejected"), kind=RENDERING_KIND_PREFERENCE)


def rewarded(*, full: bool = False) -> Case:
    job = reinforcement(steers={"max_steps": 2}, kl_weight=0.1)
    if full:
        job.full.CopyFrom(FullConfig())
    return Case(job=job, rows=prompt_rows(20), kind=RENDERING_KIND_PROMPT)


def _joined(first: list[Any], second: list[Any]) -> list[Any]:
    from dataclasses import replace

    more = len(first)
    return [*first, *(replace(one, row=one.row + more, unit=one.unit + more) for one in second)]


CASES: dict[str, Callable[[], Case]] = {
    "an adapter": supervised,
    "an adapter with dropout and a trained embedding": lambda: supervised(
        dropout=0.2, trained_modules=["embed_tokens"]
    ),
    "an adapter with DoRA": lambda: supervised(use_dora=True),
    "an adapter beside INT8": lambda: supervised(precision=BASE_PRECISION_INT8),
    "an adapter with DoRA beside NF4": lambda: supervised(precision=BASE_PRECISION_NF4, use_dora=True),
    "all weights": lambda: supervised(full=True),
    "all weights with moments in 8 bits": in_8_bits,
    "DPO": lambda: preferred(Loss.LOSS_DPO),
    "DPO of all weights, against values computed before": lambda: preferred(Loss.LOSS_DPO, full=True),
    "IPO": lambda: preferred(Loss.LOSS_IPO),
    "SimPO": lambda: preferred(Loss.LOSS_SIMPO),
    "ORPO": lambda: preferred(Loss.LOSS_ORPO),
    "KTO": lambda: preferred(Loss.LOSS_KTO),
    "a reward model": valued,
    "GRPO": rewarded,
    "GRPO of all weights": lambda: rewarded(full=True),
}


@pytest.fixture
def few_in_8_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let moments of tensors as small as a tiny model's have 8 bits."""
    monkeypatch.setattr(footprint, "_LEAST_IN_8_BITS", 1024)


@pytest.mark.usefixtures("eager", "few_in_8_bits")
@pytest.mark.parametrize("name", sorted(CASES))
async def test_no_tensor_stays_on_the_processor(site: Site, model_folder: Path, name: str) -> None:
    case = CASES[name]()
    case.give_rows(site)
    spy = DeviceSpy()

    def compute(order: TrainOrder, desk: Desk, context: TaskContext) -> TrainEnd:
        with spy:
            return computed(order, desk, torch.device("cpu"))

    async with site.worker(compute=compute):
        site.data.tokenizer_digest = (await site.register(model_folder)).tokenizer_digest
        await ended(site, "one", case.job)
    assert list(spy.found) == []
    assert spy.num_on_device > 1000
