"""Ranks of a worker's training, threads of this process: what each does of what surrounds the steps."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from tests.training.conftest import rows_of_units
from tests.training.worker.conftest import Site, compute_here, job_of
from tests.training.worker.test_reinforcement import prompts, registered, reinforcement, rollouts_of
from tests.training.worker.test_weights import ended

from luthier.errors.status import status_to_failure
from luthier.lm.load import load_model
from luthier.training.executors.joining import RankDesk
from luthier.training.executors.torchrun import _own
from luthier.training.recipes.collective import Collective, OneRank
from luthier.training.worker.computing import computed
from luthier.training.worker.order import Desk, TrainOrder
from luthier.v1.fine_tuning_job_pb2 import FineTuningJob, FullConfig, PreferenceConfig, RankRange
from luthier.v1.rendering_pb2 import RENDERING_KIND_PREFERENCE
from luthier.work.context import TaskContext
from luthier.work.requirements import Equipment
from luthier.worker.v1 import task_pb2

__all__ = ["prompts"]
T = TypeVar("T")
CPU = torch.device("cpu")


_of_thread = threading.local()


@pytest.fixture(autouse=True)
def _loaded_by_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Load in one thread while the other waits: transformers changes the process's default dtype meanwhile."""
    lock = threading.Lock()

    def load(*arguments: Any, **options: Any) -> Any:
        with lock:
            model = load_model(*arguments, **options)
        if hasattr(_of_thread, "rank"):
            _of_thread.rank.gathered(None)
        return model

    monkeypatch.setattr("luthier.training.worker.computing.load_model", load)


class Round:
    """Where threads exchange values; one that fails lets the other wait no longer."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(2, timeout=60.0)
        self.values: list[Any] = [None, None]
        self.errors: list[BaseException] = []


class RankOfThreads(OneRank):
    """One of two ranks that are threads of a process."""

    num_ranks = 2

    def __init__(self, shared: Round, rank: int) -> None:
        self._shared = shared
        self.rank = rank

    def gathered(self, value: T) -> list[T]:
        self._shared.values[self.rank] = value
        self._shared.barrier.wait()
        found = list(self._shared.values)
        self._shared.barrier.wait()
        return found

    def sum_counts(self, values: Sequence[float]) -> list[float]:
        return [sum(column) for column in zip(*self.gathered(list(values)), strict=True)]

    def sum_gradients(self, gradients: Sequence[torch.Tensor]) -> None:
        found = self.gathered([gradient.clone() for gradient in gradients])
        for gradient, *both in zip(gradients, *found, strict=True):
            gradient.copy_(both[0] + both[1])

    def of_first(self, make: Callable[[], T]) -> T:
        made: Any = make() if self.rank == 0 else None
        found: T = self.gathered(made)[0]
        return found


def compute_on_two(order: TrainOrder, desk: Desk, context: TaskContext) -> task_pb2.TrainResult:
    """Train on two ranks; the second has a desk of its own, whose calls but fetches would be seen."""
    shared = Round()

    def run(rank: int) -> task_pb2.TrainResult:
        own = _own(order, rank)
        collective: Collective = RankOfThreads(shared, rank)
        _of_thread.rank = collective
        try:
            made = computed(own, RankDesk(_Placed(desk, own), collective), CPU, collective)
            assert isinstance(made, task_pb2.TrainResult)
            return made
        except BaseException as error:
            shared.errors.append(error)
            shared.barrier.abort()
            raise shared.errors[0] from error

    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(run, (0, 1))
    assert (first.step, list(first.files)) == (second.step, list(second.files))
    return first


class _Placed:
    """A desk with a scratch folder of its own."""

    def __init__(self, desk: Desk, order: TrainOrder) -> None:
        self._desk = desk
        self.task = order.task
        self.scratch = order.scratch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._desk, name)


def on_two(job: FineTuningJob) -> FineTuningJob:
    job.ranks.CopyFrom(RankRange(min_ranks=1, max_ranks=2))
    return job


async def test_ranks_that_no_step_has_work_for_are_found_before_a_model_is_loaded(
    site: Site, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Passes are of an open size: as the longest row alone fills a step, no step has two."""
    longest = max(len(row.input_ids) for row in site.data.rows)
    wanted = job_of(max_steps=1)
    wanted.ranks.CopyFrom(RankRange(min_ranks=2))
    loaded: list[Any] = []
    async with site.worker(compute=compute_on_two, equipment=Equipment(num_ranks=2)):
        await registered(site, model_folder)
        assert (await ended(site, "enough", wanted)).run_record.num_ranks == 2
        wanted.hyperparameters.batch_tokens = longest
        monkeypatch.setattr("luthier.training.worker.computing.load_model", loaded.append)
        job = await site.ended((await site.create_job("two", wanted)).name)
    failure = status_to_failure(job.error)
    assert (failure.reason, failure.code) == ("TOO_MANY_RANKS", "FAILED_PRECONDITION")
    assert failure.message == (
        "ranks.min_ranks must be at most the 1 forward passes of the largest step, got 2: lower it, or make steps "
        "larger, as no pass is smaller than the longest row"
    )
    assert not loaded


async def test_all_weights_learn_preferences_on_two_ranks_from_one_stored_reference(
    site: Site, model_folder: Path
) -> None:
    """The reference is scored by both, and is a file of the checkpoints, which the first rank writes."""
    site.data.rows = rows_of_units(20, "chosen", "rejected")
    site.data.kind = RENDERING_KIND_PREFERENCE

    def wanted() -> FineTuningJob:
        job = job_of(num_epochs=2, batch_tokens=160, micro_batch_tokens=60, learning_rate=1e-3)
        job.full.CopyFrom(FullConfig())
        job.preference.CopyFrom(PreferenceConfig())
        return job

    async with site.worker(compute=compute_here):
        await registered(site, model_folder)
        one = await ended(site, "one", wanted())
    async with site.worker(compute=compute_on_two):
        two = await ended(site, "two", on_two(wanted()))
    alone, shared = await site.metrics(one.name), await site.metrics(two.name)
    assert len(alone) == len(shared) > 3
    for left, right in zip(shared, alone, strict=True):
        assert left.keys() == right.keys()
        for name, value in right.items():
            assert left[name] == pytest.approx(value, rel=0.02, abs=2e-3), name  # all weights are bfloat16
    assert (two.run_record.num_ranks, one.run_record.num_ranks) == (2, 1)


async def test_reinforcement_on_two_ranks_is_graded_and_kept_by_the_first(
    prompts: Site, model_folder: Path
) -> None:
    async with prompts.worker(compute=compute_on_two):
        await registered(prompts, model_folder)
        wanted = on_two(reinforcement(steers={"num_epochs": 2, "micro_batch_tokens": 60}, kl_weight=0.05))
        job = await ended(prompts, "two", wanted)
    metrics = await prompts.metrics(job.name)
    assert len(metrics) == 4
    assert all("kl" in one for one in metrics if one["num_taught"])
    drawn = await rollouts_of(prompts, job, 1)
    assert [(one.group, one.sample) for one in drawn] == [
        (group, place) for group in range(8) for place in range(6)
    ]
    assert metrics[0]["reward_mean"] == pytest.approx(sum(one.reward for one in drawn) / len(drawn))
    assert metrics[0]["sampler_trainer_gap"] < 0.02, "each rank draws with the weights that train"
