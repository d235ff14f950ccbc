"""kill -9 on the path: the job goes on from its last checkpoint and ends with the same bits as one left alone."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import pytest
from tests.e2e.conftest import WAIT, Shared, job

from luthier.client import Client
from luthier.errors import NotFound
from luthier.v1.event_pb2 import AttemptChange, Event
from luthier.v1.fine_tuning_job_pb2 import FineTuningJob, MetricPoint
from luthier.work.child import NURSERY_NAME

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("checked_in_the_end")]
STEPS, INTERVAL = 80, 20
# What the clock decides differs from run to run; all else must be equal bit for bit.
OF_THE_CLOCK = {"tokens_per_second", "sampling_seconds", "grading_seconds", "training_seconds"}


def undisturbed(client: Client, rendering: str) -> str:
    """The name of a job that nothing disturbs, which is run for the first test that wants it."""
    name = "alone"
    try:
        client.jobs.get(name)
    except NotFound:
        client.jobs.create(job(rendering, STEPS, checkpoint_interval_steps=INTERVAL), job_id=name)
    client.jobs.wait(name, timeout_seconds=WAIT)
    return name


def when_step(client: Client, name: str, step: int, act: Callable[[], None]) -> None:
    """Act while the job is just past a step, and past the checkpoint before that, which is stored meanwhile."""
    stored = 0
    for event in client.jobs.watch(name):
        if event.HasField("checkpoint"):
            stored = event.step
        if (
            event.WhichOneof("payload") == "metrics"
            and event.step >= step
            and stored >= step - step % INTERVAL
        ):
            act()
            return
    pytest.fail(f"{name} ended before step {step}")


def without_clock(points: list[MetricPoint]) -> list[tuple[int, Mapping[str, float]]]:
    return [
        (point.step, {name: value for name, value in point.values.items() if name not in OF_THE_CLOCK})
        for point in points
    ]


def assert_same_run(client: Client, left: str, right: str) -> None:
    """Two jobs have the same weights, optimiser state and metrics by step."""
    one, other = (list(client.jobs.checkpoints(name)) for name in (left, right))
    assert [point.step for point in one] == [point.step for point in other]
    assert [point.digest for point in one] == [point.digest for point in other]
    metrics = [without_clock(list(client.jobs.metrics(name))) for name in (left, right)]
    assert metrics[0] == metrics[1]
    weights = [weights_of(client, name) for name in (left, right)]
    assert weights[0] == weights[1] != {}


def weights_of(client: Client, name: str) -> dict[str, str]:
    """Digests of what a job made, by path."""
    files = client.models.files(client.jobs.get(name).tuned_model)
    return {file.path: file.sha256 for file in files if file.path.endswith("safetensors")}


def attempts(events: list[Event]) -> list[AttemptChange.Kind.ValueType]:
    return [event.attempt_change.kind for event in events if event.HasField("attempt_change")]


def test_a_killed_worker_and_a_killed_service_change_nothing(tuning: Shared) -> None:
    cluster, rendering = tuning.cluster, tuning.rendering
    with cluster.client() as client:
        alone = undisturbed(client, rendering)

        client.jobs.create(job(rendering, STEPS, checkpoint_interval_steps=INTERVAL), job_id="killed")
        watched: list[Event] = []
        watcher = threading.Thread(target=lambda: watched.extend(client.jobs.watch("killed")))
        watcher.start()

        when_step(client, "killed", INTERVAL + 5, lambda: cluster.kill("training-worker"))
        cluster.start("training-worker")
        when_step(client, "killed", 2 * INTERVAL + 5, lambda: cluster.kill("training"))
        time.sleep(0.5)
        cluster.start("training")
        done = client.jobs.wait("killed", timeout_seconds=WAIT)
        watcher.join(WAIT)

        assert_same_run(client, alone, "killed")
        assert done.num_attempts == 2
        assert attempts(watched) == [
            AttemptChange.KIND_STARTED,
            AttemptChange.KIND_LOST,
            AttemptChange.KIND_STARTED,
            AttemptChange.KIND_SUCCEEDED,
        ]
        # One watch over a killed service: no event missed, none twice.
        assert [event.sequence for event in watched] == list(range(1, len(watched) + 1))
        first, again = (
            [event.step for event in watched if event.HasField("metrics") and event.attempt == attempt]
            for attempt in (1, 2)
        )
        kept = [event.step for event in watched if event.HasField("checkpoint") and event.attempt == 1]
        # A loaded machine kills late: which checkpoint that is depends on it, and one may still be on its way.
        assert min(again) == max(kept) + 1, "the second attempt goes on from the last checkpoint"
        assert max(first) - max(kept) < 2 * INTERVAL, "no more is repeated than the checkpoints were apart"


def until_paused(client: Client, name: str) -> None:
    deadline = time.monotonic() + WAIT
    while client.jobs.get(name).state != FineTuningJob.STATE_PAUSED:
        assert time.monotonic() < deadline, f"{name} does not pause"
        time.sleep(0.05)


def test_a_job_that_pauses_while_its_worker_and_its_service_are_killed_ends_with_the_same_bits(
    tuning: Shared,
) -> None:
    cluster, rendering = tuning.cluster, tuning.rendering
    # A worker trains on while its service is away: up to the checkpoint after the next.
    long = job(rendering, 3 * STEPS, checkpoint_interval_steps=INTERVAL)
    with cluster.client() as client:
        whole = client.jobs.start(long, job_id="never-paused")
        whole.wait(timeout_seconds=WAIT)
        handle = client.jobs.start(long, job_id="paused")

        def pause_unheard() -> None:
            os.kill(cluster.pid("training-worker"), signal.SIGSTOP)
            assert handle.pause().state == FineTuningJob.STATE_PAUSING
            cluster.kill("training-worker")

        when_step(client, "paused", INTERVAL + 5, pause_unheard)
        cluster.start("training-worker")
        until_paused(client, "paused")
        handle.resume()

        next(
            event for event in client.jobs.watch("paused") if event.attempt == 2 and event.HasField("metrics")
        )
        handle.pause()
        cluster.kill("training")
        time.sleep(0.5)
        cluster.start("training")
        until_paused(client, "paused")
        assert handle.refresh().num_attempts == 2
        handle.resume()
        handle.wait(timeout_seconds=WAIT)
        assert attempts(list(client.jobs.watch("paused"))) == [
            AttemptChange.KIND_STARTED,
            AttemptChange.KIND_LOST,
            AttemptChange.KIND_STARTED,
            AttemptChange.KIND_PAUSED,
            AttemptChange.KIND_STARTED,
            AttemptChange.KIND_SUCCEEDED,
        ]
        one, other = (list(client.jobs.checkpoints(name))[-1] for name in ("never-paused", "paused"))
        assert (one.step, one.digest) == (other.step, other.digest)
        metrics = [without_clock(list(client.jobs.metrics(name))) for name in ("never-paused", "paused")]
        assert metrics[0] == metrics[1]
        assert weights_of(client, "never-paused") == weights_of(client, "paused") != {}


def training_process(worker: int) -> int:
    """The process that trains for a worker or waits for that, the first of its children of that kind."""
    deadline = time.monotonic() + 30
    while not (found := training_processes(worker)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return min(found)[1]


def training_processes(worker: int) -> list[tuple[int, int]]:
    """When they began, and their numbers."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (path / "stat").read_text().rpartition(")")[2].split()
            trains = b"luthier.training.worker.child" in (path / "cmdline").read_bytes()
            trains = trains and (path / "comm").read_text().strip() != NURSERY_NAME
            if int(words[1]) == worker and trains and words[0] != "Z":
                found.append((int(words[19]), int(path.name)))
    return found


def test_a_killed_training_process_changes_nothing_and_its_worker_goes_on(tuning: Shared) -> None:
    cluster, rendering = tuning.cluster, tuning.rendering
    with cluster.client() as client:
        alone = undisturbed(client, rendering)
        worker = cluster.pid("training-worker")
        client.jobs.create(job(rendering, STEPS, checkpoint_interval_steps=INTERVAL), job_id="child-killed")
        when_step(
            client, "child-killed", INTERVAL + 5, lambda: os.kill(training_process(worker), signal.SIGKILL)
        )
        done = client.jobs.wait("child-killed", timeout_seconds=WAIT)
        assert_same_run(client, alone, "child-killed")
        assert done.num_attempts == 2
        lost = [
            event.attempt_change
            for event in client.jobs.watch("child-killed")
            if event.attempt_change.kind == AttemptChange.KIND_LOST
        ]
        assert [change.reason for change in lost] == ["CRASHED"]
        assert "was ended by SIGKILL" in lost[0].message
    os.kill(worker, 0)


def test_a_job_takes_the_process_that_waits_for_it(tuning: Shared) -> None:
    """Importing is not part of a job; `pytest -s` shows what its first step takes from the claim on."""
    cluster, rendering = tuning.cluster, tuning.rendering
    with cluster.client() as client:
        for number in range(3):
            waiting = training_process(cluster.pid("training-worker"))
            client.jobs.create(job(rendering, 8), job_id=f"waited-{number}")
            when_step(client, f"waited-{number}", 1, lambda: None)
            assert training_process(cluster.pid("training-worker")) == waiting
            client.jobs.wait(f"waited-{number}", timeout_seconds=WAIT)
            print(
                f"first step {first_step_seconds(list(client.jobs.watch(f'waited-{number}'))):.2f} s after the claim"
            )


def first_step_seconds(events: list[Event]) -> float:
    """Seconds from the claim of a job's first attempt to what its first step measured."""
    started = next(event for event in events if event.attempt_change.kind == AttemptChange.KIND_STARTED)
    measured = next(event for event in events if event.HasField("metrics"))
    return (measured.event_time.ToDatetime() - started.event_time.ToDatetime()).total_seconds()


@pytest.mark.slow
def test_a_service_that_was_stopped_expires_no_living_workers_lease(tuning: Shared) -> None:
    cluster, rendering = tuning.cluster, tuning.rendering
    with cluster.client() as client:
        client.jobs.create(job(rendering, 100_000, checkpoint_interval_steps=1000), job_id="stopped")
        when_step(client, "stopped", 3, lambda: None)
        os.kill(cluster.pid("training"), signal.SIGSTOP)
        time.sleep(45)
        os.kill(cluster.pid("training"), signal.SIGCONT)
        step = client.jobs.get("stopped").progress.completed
        deadline = time.monotonic() + 60
        while client.jobs.get("stopped").progress.completed <= step and time.monotonic() < deadline:
            time.sleep(0.2)
        now = client.jobs.get("stopped")
        client.jobs.cancel("stopped")
        assert now.progress.completed > step
        assert now.num_attempts == 1
        events = list(client.jobs.watch("stopped"))
    assert AttemptChange.KIND_LOST not in attempts(events)


def test_a_killed_data_worker_changes_nothing(tuning: Shared) -> None:
    """The version and the rendering have the same digests whether their worker was killed or not."""
    cluster = tuning.cluster
    with cluster.client() as client:
        first = client.renderings.get(tuning.rendering)
        sources = client.datasets.versions.get(first.dataset_version).sources
        cluster.kill("data-worker")
        version = client.datasets.create_version("things", list(sources))
        cluster.start("data-worker")
        time.sleep(0.2)
        cluster.kill("data-worker")
        cluster.start("data-worker")
        client.datasets.versions.wait(version.name, timeout_seconds=WAIT)
        before = client.datasets.versions.get(first.dataset_version)
        assert client.datasets.versions.get(version.name).digest == before.digest


def test_cancel_stops_a_running_job_at_its_next_step(tuning: Shared) -> None:
    cluster, rendering = tuning.cluster, tuning.rendering
    with cluster.client() as client:
        client.jobs.create(job(rendering, 5000, checkpoint_interval_steps=INTERVAL), job_id="long")
        when_step(client, "long", 3, lambda: None)
        began = time.monotonic()
        client.jobs.cancel("long")
        events = list(client.jobs.watch("long"))
        assert events[-1].state_change.state == "CANCELLED"
        assert time.monotonic() - began < 20
        assert client.jobs.get("long").tuned_model == ""
