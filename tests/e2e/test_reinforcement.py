"""Reinforcement on the whole path: rewards rise, kill -9 changes nothing, and what cannot teach fails and says why."""

from __future__ import annotations

import re
import socket
from typing import Any

import pytest
from tests.e2e.conftest import WAIT, Shared, job
from tests.e2e.test_kill import assert_same_run, attempts, when_step

from luthier.client import Client, JobFailed
from luthier.errors import Reason
from luthier.v1.event_pb2 import AttemptChange
from luthier.v1.fine_tuning_job_pb2 import FineTuningJob, FullConfig, ReinforcementConfig
from luthier.v1.grader_pb2 import Grader, RegexGrader, RemoteGrader
from luthier.v1.rendering_pb2 import RENDERING_KIND_PROMPT, Rendering

pytestmark = pytest.mark.e2e
STEPS, INTERVAL = 30, 5
LETTERS = Grader(name="letters", regex=RegexGrader(input="{{sample.output_text}}", pattern="^[a-z]"))


@pytest.fixture
def prompts(tuning: Shared) -> str:
    """A rendering of the shared version's prompts."""
    with tuning.cluster.client() as client:
        version = client.renderings.get(tuning.rendering).dataset_version
        wanted = Rendering(dataset_version=version, model="tiny", kind=RENDERING_KIND_PROMPT)
        return client.renderings.wait(client.renderings.create(wanted).name, timeout_seconds=WAIT).name


def reinforced(rendering: str, grader: Grader, steps: int = STEPS, **config: Any) -> FineTuningJob:
    wanted = job(rendering, steps, checkpoint_interval_steps=INTERVAL)
    wanted.hyperparameters.learning_rate = 1e-2
    # A random model whose words are hardly apart: an adapter has little to turn.
    wanted.full.CopyFrom(FullConfig())
    chosen: dict[str, Any] = {"num_samples": 6, "max_new_tokens": 4, **config}
    wanted.reinforcement.CopyFrom(ReinforcementConfig(grader=grader, **chosen))
    return wanted


def rewards(client: Client, name: str) -> list[float]:
    return [point.values["reward_mean"] for point in client.jobs.metrics(name)]


def test_a_killed_worker_changes_nothing_and_rewards_rise(tuning: Shared, prompts: str) -> None:
    cluster = tuning.cluster
    with cluster.client() as client:
        client.jobs.create(reinforced(prompts, LETTERS), job_id="rewarded")
        client.jobs.wait("rewarded", timeout_seconds=WAIT)
        found = rewards(client, "rewarded")
        assert len(found) == STEPS
        assert sum(found[-8:]) / 8 > sum(found[:8]) / 8 + 0.3

        client.jobs.create(reinforced(prompts, LETTERS), job_id="rewarded-killed")
        when_step(client, "rewarded-killed", INTERVAL + 3, lambda: cluster.kill("training-worker"))
        cluster.start("training-worker")
        client.jobs.wait("rewarded-killed", timeout_seconds=WAIT)
        events = list(client.jobs.watch("rewarded-killed"))
        assert AttemptChange.KIND_LOST in attempts(events)
        told = [event.log.text for event in events if event.HasField("log")]
        assert any("answers that were kept" in text for text in told)
        assert_same_run(client, "rewarded", "rewarded-killed")

        drawn = list(client.jobs.rollouts("rewarded"))
        places = [(one.step, one.group, one.sample) for one in drawn]
        assert places == sorted(set(places))
        assert {step for step, _, _ in places} == set(range(1, STEPS + 1))
        assert list(client.jobs.rollouts("rewarded-killed", page_size=100)) == drawn
        fifth = list(client.jobs.rollouts("rewarded", step=5, page_size=7))
        assert fifth == [one for one in drawn if one.step == 5]
        mean = sum(one.reward for one in fifth) / len(fifth)
        assert mean == pytest.approx(found[4])
        assert all(one.reward == float(re.match("[a-z]", one.output_text) is not None) for one in fifth)


def test_rewards_that_cannot_teach_fail_the_job_and_say_why(tuning: Shared, prompts: str) -> None:
    constant = Grader(name="any", regex=RegexGrader(input="{{sample.output_text}}", pattern="(?s).*"))
    with tuning.cluster.client() as client, socket.socket() as deaf:
        client.jobs.create(reinforced(prompts, constant, 2), job_id="constant")
        with pytest.raises(JobFailed) as caught:
            client.jobs.wait("constant", timeout_seconds=WAIT)
        assert caught.value.reason == Reason.NO_REWARD_SPREAD

        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        address = f"127.0.0.1:{deaf.getsockname()[1]}"
        never = Grader(name="deaf", remote=RemoteGrader(address=address, timeout_seconds=1.0))
        client.jobs.create(reinforced(prompts, never, 2, max_grader_errors=5), job_id="deaf")
        with pytest.raises(JobFailed) as caught:
            client.jobs.wait("deaf", timeout_seconds=WAIT)
        assert caught.value.reason == Reason.REWARD_SERVICE_UNAVAILABLE
        assert f"grader deaf: reward service {address}: no answer within 1 s" in caught.value.message
