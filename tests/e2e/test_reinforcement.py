"""Reinforcement on the whole path: rewards rise, kill -9 changes nothing, and what cannot teach fails and says why."""

from __future__ import annotations

import json
import re
import socket
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.conftest import WAIT, Shared, job
from tests.e2e.test_kill import assert_same_run, attempts, when_step
from tokenizers import Tokenizer

from luthier.client import Client, JobFailed
from luthier.errors import FailedPrecondition, Reason
from luthier.v1.dataset_pb2 import SPLIT_TRAIN, DatasetSource
from luthier.v1.evaluation_pb2 import (
    EVALUATION_METRIC_PERPLEXITY,
    FINISH_REASON_STOP,
    Evaluation,
    EvaluationArm,
)
from luthier.v1.event_pb2 import AttemptChange
from luthier.v1.fine_tuning_job_pb2 import FineTuningJob, FullConfig, ReinforcementConfig, RewardModelConfig
from luthier.v1.grader_pb2 import Grader, RegexGrader, RemoteGrader, RewardModelGrader
from luthier.v1.rendering_pb2 import RENDERING_KIND_PREFERENCE, RENDERING_KIND_PROMPT, Rendering

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("checked_in_the_end")]
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


def test_a_model_that_rewards_tuned_is_evaluated_beside_its_base_and_a_checkpoint(
    tuning: Shared, prompts: str
) -> None:
    """By the very grader that taught it, on records that it did not learn from; each arm has weights of its own."""
    cluster = tuning.cluster
    cluster.start("evaluation-worker")
    with cluster.client() as client:
        client.jobs.create(reinforced(prompts, LETTERS), job_id="rewarded-judged")
        model = client.jobs.wait("rewarded-judged", timeout_seconds=WAIT).tuned_model
        early = next(iter(client.jobs.checkpoints("rewarded-judged"))).name
        models = {"base": "tiny", "early": early, "tuned": model}
        wanted = Evaluation(
            dataset_version=client.renderings.get(prompts).dataset_version,
            arms=[EvaluationArm(arm_id=arm_id, model=name) for arm_id, name in models.items()],
            metrics=[EVALUATION_METRIC_PERPLEXITY],
            graders=[LETTERS],
            primary_score="grader.letters",
            max_new_tokens=4,
        )
        made = client.evaluations.create(wanted, evaluation_id="rewarded")
        done = client.evaluations.wait(made.name, timeout_seconds=WAIT)
        rows = list(client.evaluations.predictions(done.name))
        first = rows[0].prompt
        alone = {
            arm_id: "".join(piece.text for piece in client.generate(name, list(first), max_new_tokens=4))
            for arm_id, name in models.items()
        }
    cluster.end("evaluation-worker", within_seconds=WAIT)
    assert (done.candidate_arm_id, list(done.verdict.prompting_arm_ids)) == ("tuned", ["base"])
    said = {
        arm_id: [answer.text for row in rows for answer in row.answers if answer.arm_id == arm_id]
        for arm_id in models
    }
    assert {arm_id: texts[0] for arm_id, texts in said.items()} == alone
    assert len(rows) == done.num_records == 12
    found = {arm.arm_id: {one.score: one.value for one in arm.scores} for arm in done.arm_results}
    for arm_id, texts in said.items():
        right = sum(re.match("[a-z]", text) is not None for text in texts)
        assert found[arm_id]["grader.letters"] == pytest.approx(right / 12)
    assert found["tuned"]["grader.letters"] > found["base"]["grader.letters"], "what it was rewarded for"
    assert len({found[arm_id]["perplexity"] for arm_id in models}) == 3, "three models, not one"


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


def judge_of_answers(tuning: Shared, client: Client) -> str:
    """A reward model of all weights that prefers small letters; returns its name."""
    path = tuning.cluster.home / "pairs.jsonl"
    with path.open("w") as file:
        for number in range(40):
            sides = {
                "chosen": "the grass is green, " + "abc"[number % 3],
                "rejected": f"THE {number} {number * 7}: {'?!#'[number % 3] * 4}",
            }
            turns = {side: [{"role": "assistant", "content": text}] for side, text in sides.items()}
            asked = [{"role": "user", "content": f"colour of thing {number}?"}]
            file.write(json.dumps({"prompt": asked, **turns}) + "\n")
    client.datasets.create("pairs")
    source = DatasetSource(upload=client.datasets.upload(path).name, split=SPLIT_TRAIN)
    version = client.datasets.create_version("pairs", [source])
    client.datasets.versions.wait(version.name, timeout_seconds=WAIT)
    wanted = Rendering(dataset_version=version.name, model="tiny", kind=RENDERING_KIND_PREFERENCE)
    rendering = client.renderings.wait(client.renderings.create(wanted).name, timeout_seconds=WAIT)
    # Few steps: of answers that are all far from both sides a sure model thinks the same.
    judging = job(rendering.name, 4)
    judging.hyperparameters.learning_rate = 1e-3
    judging.full.CopyFrom(FullConfig())
    judging.reward_model.CopyFrom(RewardModelConfig())
    client.jobs.create(judging, job_id="judge")
    return client.jobs.wait("judge", timeout_seconds=WAIT).tuned_model


def valued_by_transformers(folder: Path, texts: list[list[int]]) -> list[float]:
    import torch
    from transformers import AutoModelForSequenceClassification

    classifier: Any = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return [classifier(input_ids=torch.tensor([text])).logits.item() for text in texts]


def test_a_reward_model_of_this_place_rewards_and_a_killed_worker_changes_nothing(
    tuning: Shared, prompts: str, tmp_path: Path
) -> None:
    """The template writes a line feed behind the end of a turn: that is the token whose value was taught."""
    cluster, steps = tuning.cluster, 2 * INTERVAL
    with cluster.client() as client:
        name = judge_of_answers(tuning, client)
        wanted = reinforced(prompts, Grader(reward_model=RewardModelGrader(model="judge")), steps)
        assert not [text for text in client.jobs.plan(wanted).warnings if "reward model" in text]
        client.jobs.create(wanted, job_id="judged")
        client.jobs.wait("judged", timeout_seconds=WAIT)
        client.jobs.create(wanted, job_id="judged-killed")
        when_step(client, "judged-killed", INTERVAL + 2, lambda: cluster.kill("training-worker"))
        with pytest.raises(FailedPrecondition) as caught:
            client.models.delete("judge")
        cluster.start("training-worker")
        client.jobs.wait("judged-killed", timeout_seconds=WAIT)
        assert caught.value.reason == Reason.RESOURCE_IN_USE
        assert_same_run(client, "judged", "judged-killed")
        logs = [event.log for event in client.jobs.watch("judged") if event.HasField("log")]
        assert not [one.text for one in logs if "reward model" in one.text]
        drawn = list(client.jobs.rollouts("judged"))
        assert list(client.jobs.rollouts("judged-killed")) == drawn
        # Its last checkpoint has the reward model's weights, so that it finds the same values.
        last = list(client.jobs.checkpoints("judge"))[-1].name
        wanted.reinforcement.grader.reward_model.model = last
        client.jobs.create(wanted, job_id="judged-by-checkpoint")
        client.jobs.wait("judged-by-checkpoint", timeout_seconds=WAIT)
        assert list(client.jobs.rollouts("judged-by-checkpoint")) == drawn
        ended = [one for one in drawn if one.finish_reason == FINISH_REASON_STOP]
        cut = [one for one in drawn if one.finish_reason != FINISH_REASON_STOP]
        folder = client.models.download(name, tmp_path / "judge")
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        end = tokenizer.encode("<|im_end|>\n").ids
        assert ended
        assert {one.token_ids[-1] for one in ended} <= {end[0], 0}
        texts = [[*one.prompt_token_ids, *one.token_ids[:-1], *end] for one in ended]
        texts += [[*one.prompt_token_ids, *one.token_ids] for one in cut[:40]]
        theirs = valued_by_transformers(folder, texts)
        ours = [one.reward for one in (*ended, *cut[:40])]
        assert ours == pytest.approx(theirs, rel=0.05, abs=0.05)
        assert max(ours) - min(ours) > 0.5
        # Without the line feed the values are others.
        bare = valued_by_transformers(folder, [text[:-1] for text in texts[: len(ended)]])
        assert max(abs(one - other) for one, other in zip(bare, ours, strict=False)) > 0.2
