"""Ranks that divide a model, through real services: the steps of one rank, also when one of them is killed."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tests.training.executors.test_torchrun import (
    assert_close,
    crew_of,
    disturbed,
    signalled,
    wanted,
    working,
)
from tests.training.worker.conftest import Site, job_of
from tests.training.worker.test_in_child import assert_same, changes
from tests.training.worker.test_reinforcement import prompts, reinforcement
from tests.training.worker.test_reward_models import JUDGE, judging, registered
from tests.training.worker.test_weights import _digests, downloaded, ended, going_on

from luthier.errors.status import status_to_failure
from luthier.lm.load import load_model
from luthier.v1.base_precision_pb2 import BASE_PRECISION_INT8
from luthier.v1.event_pb2 import AttemptChange
from luthier.v1.fine_tuning_job_pb2 import (
    DETERMINISM_BITWISE,
    SHARDING_FSDP2,
    FineTuningJob,
    FullConfig,
    RankRange,
)
from luthier.work.children import Children
from luthier.work.requirements import Equipment

__all__ = ["prompts"]


def asked(*, full: bool = False, is_divided: bool = True, **hyperparameters: Any) -> FineTuningJob:
    job = wanted(**hyperparameters) if is_divided else job_of(micro_batch_tokens=48, **hyperparameters)
    if is_divided:
        job.sharding = SHARDING_FSDP2
    if full:
        job.full.CopyFrom(FullConfig())
    return job


async def test_an_adapter_of_a_divided_model_outlives_a_rank_and_loses_no_bit(
    site: Site, model_folder: Path, children: Children
) -> None:
    async with working(site, model_folder, crew_of(children, 2)):
        alone = await site.ended((await site.create_job("alone", asked(is_divided=False, num_epochs=4))).name)
        whole = await site.ended((await site.create_job("whole", asked(num_epochs=4))).name)
        for job in (alone, whole):
            assert job.state == FineTuningJob.STATE_SUCCEEDED, job.error
        assert (whole.run_record.sharding, whole.run_record.num_ranks) == (SHARDING_FSDP2, 2)
        assert whole.run_record.determinism == DETERMINISM_BITWISE
        for number, rank in ((signal.SIGKILL, 1), (signal.SIGSTOP, 0)):
            hurt = await disturbed(site, f"hurt-{rank}", signalled(number, rank), asked(num_epochs=4))
            assert hurt.job.state == FineTuningJob.STATE_SUCCEEDED, hurt.job.error
            lost, succeeded = changes(hurt.events)
            assert (lost, succeeded[0]) == (
                (AttemptChange.KIND_LOST, "RANK_LOST"),
                AttemptChange.KIND_SUCCEEDED,
            )
            assert f"rank {rank} of 2" in hurt.why
            assert 0 < hurt.seconds < 10.0
            await assert_same(site, whole.name, hurt.job.name)
    assert_close(await site.metrics(whole.name), await site.metrics(alone.name))


async def test_all_weights_are_stored_in_parts_and_are_one_model_at_the_end(
    site: Site, model_folder: Path, children: Children, tmp_path: Path
) -> None:
    """A checkpoint of divided weights goes on undivided, as a job of its own."""
    async with working(site, model_folder, crew_of(children, 2)):
        alone = await site.ended((await site.create_job("alone", asked(full=True, is_divided=False))).name)
        two = await site.ended((await site.create_job("two", asked(full=True))).name)
        for job in (alone, two):
            assert job.state == FineTuningJob.STATE_SUCCEEDED, job.error
        last = (await site.checkpoints(two.name))[-1]
        loaded = load_model(await downloaded(site, two.tuned_model, tmp_path / "tuned"))
        more = await site.ended((await site.create_job("more", going_on(last.name))).name)
    assert_close(await site.metrics(two.name), await site.metrics(alone.name))
    assert loaded.dtype == torch.bfloat16
    assert not list((tmp_path / "tuned").glob("*-part-*")), "what others load is no part"
    assert set(_digests(site, "masters-part-00001-00000.safetensors")) == {"two"}
    assert set(_digests(site, "masters.safetensors")) == {"alone", "more"}
    assert set(_digests(site, "model.safetensors")) == {"alone", "two", "more"}
    assert more.state == FineTuningJob.STATE_SUCCEEDED, more.error
    before, after = await site.metrics(alone.name), await site.metrics(more.name)
    assert after[0]["train_loss"] < before[0]["train_loss"] / 1.5


async def test_a_job_that_cannot_be_divided_fails_by_name_and_is_not_tried_again(
    site: Site, model_folder: Path, children: Children
) -> None:
    """What the adapter was learnt beside is told by the checkpoint, and by no field of the job."""
    beside = job_of(micro_batch_tokens=48)
    beside.base_precision = BASE_PRECISION_INT8
    async with working(site, model_folder, crew_of(children, 2)):
        quantised = await ended(site, "quantised", beside)
        last = (await site.checkpoints(quantised.name))[-1]
        more = going_on(last.name, micro_batch_tokens=48)
        more.sharding = SHARDING_FSDP2
        more.ranks.CopyFrom(RankRange(min_ranks=2, max_ranks=2))
        job = await site.ended((await site.create_job("more", more)).name)
    assert (job.state, job.num_attempts) == (FineTuningJob.STATE_FAILED, 1)
    failure = status_to_failure(job.error)
    assert (failure.reason, failure.code) == ("SHARDING_INVALID", "FAILED_PRECONDITION")
    assert "must be held in BFLOAT16, this one is quantised" in failure.message
    assert "sharding SHARDING_REPLICATED" in failure.message


async def test_a_reward_adapter_of_the_same_base_judges_by_a_base_of_its_own(
    prompts: Site, model_folder: Path, children: Children, token_rows: Callable[..., list[Any]]
) -> None:
    """The first rank judges alone: of a divided model it would wait for ranks that ask nothing."""

    def on_two(job: FineTuningJob) -> FineTuningJob:
        job.sharding = SHARDING_FSDP2
        job.ranks.CopyFrom(RankRange(min_ranks=2))
        job.hyperparameters.micro_batch_tokens = 80
        return job

    async with prompts.worker(compute=crew_of(children, 2), equipment=Equipment(num_ranks=2)):
        await registered(prompts, model_folder, token_rows)
        judge = await ended(prompts, "judge", on_two(judging()))
        steers = {"num_epochs": 2, "learning_rate": 5e-2}
        job = await ended(prompts, "one", on_two(reinforcement(JUDGE, steers=steers, kl_weight=0.05)))
    assert judge.run_record.sharding == job.run_record.sharding == SHARDING_FSDP2
    metrics = await prompts.metrics(job.name)
    assert len(metrics) == 4
    assert all("reward_mean" in one for one in metrics)
    assert metrics[0]["sampler_trainer_gap"] < 0.02, "what is drawn from is what trains"
