"""Jobs on a real cluster of two nodes, parts of which are killed: the attempt is lost, and the job goes on.

The tests share the cluster and run in this order: the last one takes a node away.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.training.executors.ray.clusters import LocalCluster
from tests.training.executors.test_torchrun import assert_close, texts, wanted
from tests.training.worker.conftest import Site
from tests.training.worker.test_in_child import assert_same, changes
from tests.training.worker.test_pausing import (
    assert_pauses_with_a_checkpoint,
    assert_same_end,
    attempts,
    resume,
)
from tests.training.worker.test_reinforcement import prompts, reinforcement, rollouts_of
from tests.training.worker.test_weights import ended

from luthier.training.executors.pulse import shown
from luthier.training.executors.ray.driver import OnRay, found_fleet
from luthier.training.executors.ray.orders import Fleet
from luthier.v1.event_pb2 import AttemptChange, Event
from luthier.v1.fine_tuning_job_pb2 import FineTuningJob, RankRange
from luthier.v1.training_service_pb2 import CancelFineTuningJobRequest
from luthier.work.children import Children
from luthier.work.requirements import Equipment
from luthier.work.worker_config import WorkerConfig

__all__ = ["prompts"]
pytest.importorskip("ray", reason="needs the extra ray")
pytestmark = pytest.mark.slow
EPOCHS = 8
EQUIPMENT = Equipment(num_ranks=2)
"""Jobs that ask for two ranks are given to nobody who does not say that it has them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hurt:
    """A job that lost something: its end, its events, why and how soon after the attempt was lost."""

    job: FineTuningJob
    events: list[Event]
    why: str
    seconds: float


@asynccontextmanager
async def working(site: Site, folder: Path, children: Children, cluster: LocalCluster) -> AsyncIterator[None]:
    fleet = Fleet(address=cluster.address, num_ranks=2)
    async with site.worker(compute=OnRay(children, fleet), equipment=EQUIPMENT):
        site.data.tokenizer_digest = (await site.register(folder)).tokenizer_digest
        yield


def ranks_of(cluster: LocalCluster) -> dict[int, int]:
    """The processes of the ranks that have begun, by rank."""
    paths = [path for node in cluster.nodes for path in (node.home / "ray").glob("*/pulse-?")]
    sights = {int(path.name[-1]): shown(path) for path in paths}
    return {rank: one.pid for rank, one in sights.items() if one is not None}


async def hurt_by(site: Site, cluster: LocalCluster, job: FineTuningJob, hurt: str) -> Hurt:
    """Hurt a running job after its first checkpoint, and wait for its end."""
    events: list[Event] = []
    hurt_at, seconds, why = 0.0, 0.0, ""
    async for event in site.watch(job.name):
        events.append(event)
        if event.HasField("checkpoint") and not hurt_at:
            ranks = ranks_of(cluster)
            assert sorted(ranks) == [0, 1]
            hurt_at = time.monotonic()
            if hurt == "node":
                cluster.nodes[1].kill()
            else:
                os.kill(ranks[1], signal.SIGKILL if hurt == "kill" else signal.SIGSTOP)
        if event.attempt_change.kind == AttemptChange.KIND_LOST and not seconds:
            seconds, why = time.monotonic() - hurt_at, event.attempt_change.message
    return Hurt(job=await site.ended(job.name), events=events, why=why, seconds=seconds)


def test_a_worker_is_told_what_its_cluster_has(cluster: LocalCluster, tmp_path: Path) -> None:
    config = WorkerConfig(
        home=tmp_path,
        log_level="INFO",
        data_address="",
        training_address="",
        evaluation_address="",
        reward_addresses=(),
        judge_addresses=(),
        judge_keys=(),
        executor="ray",
        ranks=2,
        ray_address=cluster.address,
    )
    fleet, device = found_fleet(config)
    assert (fleet.num_ranks, fleet.device, fleet.num_threads) == (2, "cpu", 1)
    assert (device.name, device.equipment.device) == ("cpu", "CPU")
    assert device.equipment.memory_bytes > 1 << 28


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ("--ranks", "3"),
            "at most the 2 that the cluster 127.0.0.1:PORT has room for, with 1 CPU each: it has 2 nodes",
        ),
        (("--ranks", "2", "--device", "cuda"), "at most the 0 that the cluster"),
        (("--ranks", "2", "--device", "cuda:1"), "auto, cpu, cuda or rocm with the executor ray"),
    ],
    ids=["ranks", "gpus", "gpu"],
)
def test_a_worker_whose_cluster_has_no_room_does_not_start(
    cluster: LocalCluster, tmp_path: Path, options: tuple[str, ...], words: str
) -> None:
    command = [sys.executable, "-m", "luthier.daemon", "worker", "training", "--executor", "ray"]
    found = subprocess.run(
        [*command, "--ray-address", cluster.address, *options],
        env={**os.environ, "LUTHIER_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert found.returncode == 1
    assert words in found.stderr.replace(cluster.address, "127.0.0.1:PORT")


async def test_a_job_runs_on_both_nodes_and_comes_to_the_same_bits_after_the_loss_of_a_rank(
    site: Site, model_folder: Path, children: Children, cluster: LocalCluster
) -> None:
    async with working(site, model_folder, children, cluster):
        whole = await site.ended((await site.create_job("whole", wanted(num_epochs=EPOCHS))).name)
        assert whole.state == FineTuningJob.STATE_SUCCEEDED, whole.error
        assert whole.run_record.num_ranks == 2
        for node in cluster.nodes:
            assert [path for path in (node.home / "cache").iterdir() if len(path.name) == 64], (
                "fetched by digest"
            )
            assert not list((node.home / "ray").glob("*/*")), "what an attempt left is deleted"

        for hurt, words in (("kill", "rank 1 of 2 is lost"), ("stop", "rank 1 of 2 hangs")):
            job = await site.create_job(hurt, wanted(num_epochs=EPOCHS))
            found = await hurt_by(site, cluster, job, hurt)
            _check_lost(found, words)
            assert found.job.run_record.num_ranks == 2
            await assert_same(site, whole.name, job.name)


async def test_answers_that_ranks_of_two_nodes_draw_are_graded_and_kept(
    prompts: Site, model_folder: Path, children: Children, cluster: LocalCluster
) -> None:
    """What the first rank leaves on its node is fetched from there by the driver."""
    wanted = reinforcement(steers={"num_epochs": 2, "micro_batch_tokens": 80})
    wanted.ranks.CopyFrom(RankRange(min_ranks=2))
    async with working(prompts, model_folder, children, cluster):
        job = await ended(prompts, "drawn", wanted)
    assert (job.run_record.num_ranks, job.num_attempts) == (2, 1)
    metrics = await prompts.metrics(job.name)
    assert metrics
    assert all("reward_mean" in one for one in metrics)
    for step in range(1, len(metrics) + 1):
        drawn = await rollouts_of(prompts, job, step)
        places = {(one.group, one.sample) for one in drawn}
        assert places == {(group, sample) for group in range(len(drawn) // 6) for sample in range(6)}
        assert drawn
        assert all(one.token_ids and len(one.logprobs) == len(one.token_ids) for one in drawn)


async def test_a_job_that_pauses_leaves_both_nodes_and_ends_with_the_same_bits(
    site: Site, model_folder: Path, children: Children, cluster: LocalCluster
) -> None:
    asked = wanted(num_epochs=30)
    asked.checkpoint_interval_steps = 1000
    async with working(site, model_folder, children, cluster):
        whole = await site.ended((await site.create_job("whole", asked)).name)
        job = await site.create_job("paused", asked)
        step = await assert_pauses_with_a_checkpoint(site, job.name, 3)
        assert ranks_of(cluster) == {}, "both are gone"
        for node in cluster.nodes:
            assert not list((node.home / "ray").glob("*/*")), "what the attempt left is deleted"
        between = await site.ended((await site.create_job("between", wanted(num_epochs=1))).name)
        assert between.state == FineTuningJob.STATE_SUCCEEDED, "the processors of both nodes are free"
        assert between.run_record.num_ranks == 2

        assert (await resume(site, job.name)).state == FineTuningJob.STATE_QUEUED
        resumed = await site.ended(job.name)
        events = [event async for event in site.watch(job.name)]
    assert step < len(await site.metrics(whole.name))
    await assert_same_end(site, whole, resumed)
    assert (whole.num_attempts, resumed.num_attempts) == (1, 2)
    assert resumed.run_record.num_ranks == whole.run_record.num_ranks == 2
    assert attempts(events) == ["STARTED", "PAUSED", "STARTED", "SUCCEEDED"]


async def test_a_job_goes_on_on_the_node_that_is_left(
    site: Site, model_folder: Path, children: Children, cluster: LocalCluster
) -> None:
    async with site.worker():
        site.data.tokenizer_digest = (await site.register(model_folder)).tokenizer_digest
        here = await site.ended((await site.create("here", micro_batch_tokens=48, num_epochs=EPOCHS)).name)
        assert here.state == FineTuningJob.STATE_SUCCEEDED, here.error
    compute = OnRay(children, Fleet(address=cluster.address, num_ranks=2))
    async with site.worker(compute=compute, equipment=EQUIPMENT):
        job = await site.create_job("node", wanted(1, 2, num_epochs=EPOCHS))
        found = await hurt_by(site, cluster, job, "node")
        _check_lost(found, "of 2")
        assert found.job.run_record.num_ranks == 1
        told = [text for text in texts(found.events) if "trains on 1 ranks in place of 2" in text]
        assert len(told) == 1
        assert "the cluster has 1 nodes that answer, 1 processors" in told[0]
        assert_close(await site.metrics(job.name), await site.metrics(here.name))

        short = await site.create_job("short", wanted(2, 2))
        async for event in site.watch(short.name):
            if event.attempt_change.kind == AttemptChange.KIND_LOST:
                break
        await site.jobs.CancelFineTuningJob(
            CancelFineTuningJobRequest(name=short.name), metadata=site.metadata
        )
        assert event.attempt_change.reason == "TOO_FEW_RANKS"
        assert "takes at least 2 ranks, the cluster" in event.attempt_change.message
        assert "has room for 1 now: it has 1 nodes that answer" in event.attempt_change.message
        assert (await site.ended(short.name)).state == FineTuningJob.STATE_CANCELLED


def _check_lost(found: Hurt, words: str) -> None:
    assert found.job.state == FineTuningJob.STATE_SUCCEEDED, found.job.error
    lost, succeeded = changes(found.events)
    assert lost == (AttemptChange.KIND_LOST, "RANK_LOST")
    assert succeeded[0] == AttemptChange.KIND_SUCCEEDED
    assert words in found.why
    assert 0 < found.seconds < 10.0
