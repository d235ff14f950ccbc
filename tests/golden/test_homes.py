"""Homes that former code made: today's code migrates them, answers as it did, and goes on with their work."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.golden.answers import Asker, read_answers
from tests.golden.comparing import Allowed, differences, replay, unmeant, unused
from tests.golden.home_files import unpack_home
from tests.golden.making import RestingCluster

from luthier.client import Client
from luthier.v1.chat_pb2 import ChatMessage
from luthier.v1.evaluation_pb2 import Evaluation, EvaluationArm
from luthier.v1.fine_tuning_job_pb2 import FineTuningJob

HOMES = sorted((Path(__file__).parent / "homes").iterdir())
WAIT = 240.0

# What the answers of a home may differ in, by the home's name.
ALLOWED: dict[str, list[Allowed]] = {}


@pytest.fixture(params=HOMES, ids=lambda folder: folder.name)
def folder(request: pytest.FixtureRequest) -> Path:
    chosen: Path = request.param
    return chosen


@pytest.fixture
def cluster(folder: Path, tmp_path: Path) -> Iterator[RestingCluster]:
    running = RestingCluster(tmp_path / "home")
    unpack_home(folder, running.home)
    yield running
    running.stop()


@pytest.mark.e2e
def test_a_former_home_answers_as_it_did(folder: Path, cluster: RestingCluster) -> None:
    recorded = read_answers(folder, cluster.home)
    cluster.start("data", "training", "evaluation")
    with Asker(cluster.addresses, cluster.api_key()) as asker:
        found = list(replay(asker, recorded))
    allowed = ALLOWED.get(folder.name, [])
    assert unmeant(found, allowed) == []
    assert unused(found, allowed) == []


@pytest.mark.e2e
@pytest.mark.slow
def test_work_of_a_former_home_goes_on(folder: Path, cluster: RestingCluster) -> None:
    """What rested goes on where it stood: jobs from their checkpoints, all that was queued or lost from the queue."""
    cluster.lease_seconds = 10.0
    cluster.start("data", "training", "evaluation")
    cluster.start("data-worker", "training-worker", "evaluation-worker")
    with cluster.client() as client:
        for version in ("queued", "building"):
            client.datasets.versions.wait(f"empty/{version}", timeout_seconds=WAIT)
        for rendering in ("queued", "rendering", "lost"):
            client.renderings.wait(rendering, timeout_seconds=WAIT)
        for model in ("queued", "registering"):
            client.models.wait(model, timeout_seconds=WAIT)
        for job in ("queued", "preparing", "lost"):
            client.jobs.wait(job, timeout_seconds=WAIT)
        for job in ("given-back", "running"):
            check_resumed(client, job)
        for evaluation in ("queued", "lost"):
            client.evaluations.wait(evaluation, timeout_seconds=WAIT)
        assert client.jobs.get("cancelling").state == FineTuningJob.STATE_CANCELLED
        check_old_resources(client)


def check_resumed(client: Client, name: str) -> None:
    """A job with a checkpoint goes on behind it and keeps what it measured before."""
    done = client.jobs.wait(name, timeout_seconds=WAIT)
    assert done.progress.completed == done.progress.total
    points = list(client.jobs.metrics(name))
    assert [point.step for point in points] == list(range(1, done.progress.total + 1))
    assert points[0].attempt == 1
    assert points[-1].attempt == done.num_attempts > 1
    resumed = min(point.step for point in points if point.attempt > 1)
    assert resumed > 10, f"{name} began again at step {resumed}"


def check_old_resources(client: Client) -> None:
    """What was finished serves new work: a tuned model answers, and is evaluated on an old version."""
    turns = [ChatMessage(role="user", content="colour of thing 1?")]
    pieces = list(client.generate("taught-model", turns, max_new_tokens=4))
    assert pieces[-1].finish_reason
    arms = [EvaluationArm(arm_id="tuned", model="taught-model"), EvaluationArm(arm_id="base", model="tiny")]
    wanted = Evaluation(dataset_version="things/v1", arms=arms, max_new_tokens=4)
    created = client.evaluations.create(wanted)
    done = client.evaluations.wait(created.name, timeout_seconds=WAIT)
    assert done.num_records == len(list(client.evaluations.predictions(created.name))) == 6


def leaves(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield each container and key of something that can be lost."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield value, key
        yield from leaves(inner)


def test_nothing_that_was_recorded_can_be_lost_unseen(folder: Path, tmp_path: Path) -> None:
    """The comparison finds every single value of an answer that is gone, and every one that is another."""
    answer = next(one for one in read_answers(folder, tmp_path) if one["rpc"].endswith("/GetEvaluation"))
    assert list(differences(answer, copy.deepcopy(answer))) == []
    for number in range(len(list(leaves(answer)))):
        for change in ("lost", "another"):
            changed = copy.deepcopy(answer)
            container, key = list(leaves(changed))[number]
            if change == "lost":
                del container[key]
            else:
                container[key] = "another"
            assert list(differences(answer, changed)), (change, container, key)


def test_what_is_new_is_no_difference() -> None:
    assert list(differences({"a": [{"b": 1}]}, {"a": [{"b": 1, "c": 2}], "d": 3})) == []
    assert list(differences({"a": 0}, {"a": False})) == [(".a", 0, False)]
