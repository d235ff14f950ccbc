"""A long time of kills at random points, and of callers who leave: nothing is lost, nothing grows. Seeds are fixed."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from tests.e2e.conftest import SERVICES, TUNING_WORKERS, WAIT, Cluster, Shared, job, write_examples
from tests.e2e.test_kill import assert_same_run, training_processes

from luthier.client import Client
from luthier.runtime.keys import read_or_create_keys
from luthier.v1 import training_service_pb2, training_service_pb2_grpc
from luthier.v1.dataset_pb2 import SPLIT_TRAIN, DatasetSource, DatasetVersion
from luthier.v1.event_pb2 import Event
from luthier.v1.fine_tuning_job_pb2 import FineTuningJob
from luthier.v1.model_pb2 import Model
from luthier.v1.rendering_pb2 import Rendering

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.usefixtures("checked_in_the_end")]
ROUNDS, KILLS, SEED = 24, 52, 14
STEPS, INTERVAL = 30, 6
CHILD = "the process that trains"
VICTIMS = {CHILD: 8, "training": 6, "data": 4, "data-worker": 2, "training-worker": 3}
"""What is killed, and how often beside the others."""
MOST_LOST = 2
"""Attempts of one job that are taken from it: with five of them it fails, as it should."""
NUM_STREAMS, NUM_CONNECTIONS, AT_ONCE = 2_000, 500, 50


class Killer:
    """Kills by chance and starts again what it killed.

    It is the supervisor too: a worker whose first process is killed while it starts ends, and has to be started again.
    """

    def __init__(self, cluster: Cluster, seed: int) -> None:
        self._cluster = cluster
        self._random = random.Random(seed)
        self._acting = threading.Lock()
        self.killed: Counter[str] = Counter()
        self.num_restarts = 0

    @contextmanager
    def supervising(self) -> Iterator[None]:
        """Start again workers that end by themselves, for the length of a block."""
        over = threading.Event()

        def supervise() -> None:
            while not over.wait(0.3):
                with self._acting:
                    self.num_restarts += sum(map(self._cluster.restart_ended, TUNING_WORKERS))

        thread = threading.Thread(target=supervise)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def strike(self, count: int) -> None:
        """Kill so many processes, at random moments of which most are within a job of this test."""
        lost = 0
        for _ in range(count):
            time.sleep(self._random.uniform(0.0, 1.5))
            every = {name: weight for name, weight in VICTIMS.items() if lost < MOST_LOST or name in SERVICES}
            (victim,) = self._random.choices(list(every), list(every.values()))
            lost += victim in (CHILD, "training-worker")
            self.killed[victim] += 1
            with self._acting:
                self._kill(victim)

    def _kill(self, victim: str) -> None:
        if victim == CHILD:
            for _, pid in training_processes(self._cluster.pid("training-worker"))[:1]:
                os.kill(pid, signal.SIGKILL)
            return
        self._cluster.kill(victim)
        self._cluster.start(victim)


def versioned(client: Client, folder: Path, name: str) -> tuple[DatasetVersion, Rendering]:
    """Bring a file to a rendering, while services are killed."""
    client.datasets.create(name)
    upload = client.datasets.upload(write_examples(folder / "soak.jsonl", 12))
    source = DatasetSource(upload=upload.name, split=SPLIT_TRAIN)
    version = client.datasets.create_version(name, [source])
    version = client.datasets.versions.wait(version.name, timeout_seconds=WAIT)
    rendering = client.renderings.create(
        Rendering(dataset_version=version.name, model="tiny"), rendering_id=name
    )
    return version, client.renderings.wait(rendering.name, timeout_seconds=WAIT)


def check_whole(client: Client, names: list[str]) -> None:
    """Every job is done once, with a model that can be had, and all its events are there in order."""
    for name in names:
        ended = client.jobs.get(name)
        assert ended.state == FineTuningJob.STATE_SUCCEEDED, ended.error
        events = list(client.jobs.watch(name))
        assert [event.sequence for event in events] == list(range(1, len(events) + 1))
        steps = [event.step for event in events if event.HasField("metrics")]
        assert set(steps) == set(range(1, STEPS + 1))
        assert [one.step for one in client.jobs.checkpoints(name)][-1] == STEPS
        assert client.models.get(ended.tuned_model).state == Model.STATE_READY
    tuned = [
        model.name for model in client.models.list() if model.fine_tuning_job.rpartition("/")[2] in names
    ]
    assert len(tuned) == len(names)


def test_services_and_workers_killed_at_random_lose_no_event_and_change_no_bit(
    tuning: Shared, tmp_path: Path
) -> None:
    cluster, killer = tuning.cluster, Killer(tuning.cluster, SEED)
    per_round = [KILLS // ROUNDS + (number < KILLS % ROUNDS) for number in range(ROUNDS)]
    names = [f"soak-{number}" for number in range(ROUNDS)]
    watched: dict[str, list[Event]] = {name: [] for name in names}
    began = time.monotonic()
    with killer.supervising(), cluster.client() as client:
        wanted = job(tuning.rendering, STEPS, checkpoint_interval_steps=INTERVAL, max_checkpoints=10)
        client.jobs.create(wanted, job_id="soak-alone")
        client.jobs.wait("soak-alone", timeout_seconds=WAIT)
        _, alone = versioned(client, tmp_path, "soak-alone")
        for name, kills in zip(names, per_round, strict=True):
            client.jobs.create(wanted, job_id=name)
            watcher = threading.Thread(target=lambda name=name: watched[name].extend(client.jobs.watch(name)))
            watcher.start()
            striking = threading.Thread(target=killer.strike, args=(kills,))
            striking.start()
            version, rendering = versioned(client, tmp_path, name)
            striking.join(WAIT)
            client.jobs.wait(name, timeout_seconds=WAIT)
            watcher.join(WAIT)
            assert (version.state, rendering.state) == (DatasetVersion.STATE_READY, Rendering.STATE_READY)
            assert rendering.digest == alone.digest
        check_whole(client, names)
        for name in names:
            assert [event.sequence for event in watched[name]] == list(range(1, len(watched[name]) + 1))
            assert_same_run(client, "soak-alone", name)
        attempts = sum(client.jobs.get(name).num_attempts for name in names)
    print(
        f"{time.monotonic() - began:.0f} s, {dict(killer.killed)}, {attempts} attempts of {ROUNDS} jobs, "
        f"{killer.num_restarts} workers ended while they began"
    )
    assert sum(killer.killed.values()) == KILLS
    assert attempts > ROUNDS, "some kill must have cost an attempt"


def held(pid: int) -> tuple[int, int]:
    """The resident KiB and the open descriptors of a process."""
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    resident = next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))
    return resident, len(os.listdir(f"/proc/{pid}/fd"))


def leave_streams(address: str, name: str, secret: Any, count: int) -> None:
    """Open streams, some at once, read the first event of each, and go."""
    request = training_service_pb2.WatchFineTuningJobRequest(name=name)
    with grpc.insecure_channel(address) as channel:
        stub: Any = training_service_pb2_grpc.TrainingServiceStub(channel)
        for _ in range(count // AT_ONCE):
            calls = [stub.WatchFineTuningJob(request, metadata=secret) for _ in range(AT_ONCE)]
            for call in calls:
                next(call)
            for call in calls:
                call.cancel()


def leave_connections(address: str, name: str, secret: Any, count: int) -> None:
    request = training_service_pb2.GetFineTuningJobRequest(name=name)
    for number in range(count):
        # Else all share one connection.
        options = [("grpc.use_local_subchannel_pool", 1), ("luthier.number", number)]
        with grpc.insecure_channel(address, options) as channel:
            stub: Any = training_service_pb2_grpc.TrainingServiceStub(channel)
            stub.GetFineTuningJob(request, metadata=secret, timeout=30)


def test_streams_and_connections_that_are_left_leave_nothing(tuning: Shared) -> None:
    cluster = tuning.cluster
    cluster.end("training-worker", within_seconds=30)
    secret = (("authorization", f"Bearer {read_or_create_keys(cluster.home).api_key}"),)
    address, pid = cluster.addresses["training"], cluster.pid("training")
    with cluster.client() as client:
        name = client.jobs.create(job(tuning.rendering, 3), job_id="soak-watched").name
        # What is made once, such as connections to the database, is made before.
        leave_streams(address, name, secret, 10 * AT_ONCE)
        leave_connections(address, name, secret, 50)
        time.sleep(2)
        before = held(pid)
        leave_streams(address, name, secret, NUM_STREAMS)
        leave_connections(address, name, secret, NUM_CONNECTIONS)
        time.sleep(2)
        after = held(pid)
        client.jobs.cancel(name)
    print(f"KiB resident and descriptors: before {before}, after {after}")
    # Connections to the database come and go, some descriptors each; one in a hundred that stays would be more.
    assert after[1] - before[1] < (NUM_STREAMS + NUM_CONNECTIONS) // 100
    assert after[0] - before[0] < 16 * 1024, "8 KiB of each that is kept would be more"
