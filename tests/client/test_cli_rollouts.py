"""`luthier jobs rollouts`, `--reinforcement`, and the SDK's `rollouts`, against fake services."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from luthier.client import AsyncClient, Client
from luthier.v1.evaluation_pb2 import FINISH_REASON_LENGTH, FINISH_REASON_STOP
from luthier.v1.fine_tuning_job_pb2 import FineTuningJob, FineTuningPlan
from luthier.v1.rollout_pb2 import Rollout
from luthier.v1.training_service_pb2 import ListRolloutsRequest, ListRolloutsResponse

Run = Callable[..., Result]
JOB = "projects/default/fineTuningJobs/one"
GRADER = 'string_check: {input: "{{sample.output_text}}", reference: "{{item.completion}}", operation: eq}\n'


def rollout(step: int, sample: int, **changes: Any) -> Rollout:
    return Rollout(
        **{
            "step": step,
            "group": 1,
            "sample": sample,
            "prompt_text": "Add 2 and 2.",
            "output_text": "4",
            "token_ids": [5, 2],
            "logprobs": [-0.5, -0.25],
            "finish_reason": FINISH_REASON_STOP,
            "reward": 1.0,
            "advantage": 0.5,
            **changes,
        }
    )


class Listing:
    """Answers ListRollouts, two a page."""

    def __init__(self, *rollouts: Rollout) -> None:
        self.rollouts = rollouts
        self.requests: list[ListRolloutsRequest] = []

    def __call__(self, request: ListRolloutsRequest, context: Any) -> ListRolloutsResponse:
        self.requests.append(request)
        found = [one for one in self.rollouts if request.step in (0, one.step)]
        first = int(request.page_token or 0)
        token = str(first + 2) if first + 2 < len(found) else ""
        return ListRolloutsResponse(rollouts=found[first : first + 2], next_page_token=token)


@pytest.fixture
def listing(services: Any) -> Listing:
    failed = rollout(2, 1, advantage=0.0)
    failed.error.message = "reward service 127.0.0.1:1:\nno answer"
    made = Listing(
        rollout(1, 0),
        rollout(1, 1, reward=0.125, advantage=-0.5, finish_reason=FINISH_REASON_LENGTH),
        rollout(2, 0, output_text="a\x1b[31m\nb", prompt_text="begin" + "x" * 100 + "end"),
        failed,
    )
    services.answers["ListRollouts"] = made
    return made


def test_rollouts_are_a_table_for_people(listing: Listing, run: Run) -> None:
    result = run("jobs", "rollouts", "one")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert re.match(r"STEP +GROUP +SAMPLE +REWARD +ADVANTAGE +TOKENS +END +PROMPT +ANSWER", lines[0])
    assert re.match(r" +1 +1 +0 +1 +\+0\.5 +2 +stop +Add 2 and 2\. +4", lines[1])
    assert re.match(r" +1 +1 +1 +0\.125 +-0\.5 +2 +length +Add 2 and 2\. +4", lines[2])
    assert "\x1b" not in result.stdout
    assert r"a\x1b[31m\nb" in result.stdout.replace("\n", "")
    assert "begin" in result.stdout
    assert "end" in result.stdout
    assert "x" * 80 not in result.stdout.replace("\n", "").replace(" ", "")
    assert "no answer" in result.stdout
    assert [request.parent for request in listing.requests] == [JOB, JOB]


def test_rollouts_of_one_step_are_asked_for_alone(listing: Listing, run: Run) -> None:
    result = run("jobs", "rollouts", "one", "--step", "2", "--json")
    assert result.exit_code == 0, result.output
    assert [(one["step"], one.get("reward")) for one in json.loads(result.stdout)] == [
        ("2", 1.0),
        ("2", None),
    ]
    assert json.loads(result.stdout)[0]["logprobs"] == [-0.5, -0.25]
    assert "\x1b" not in result.stdout
    assert {request.step for request in listing.requests} == {2}


def test_no_more_than_wanted_are_read_and_that_there_are_more_is_said(listing: Listing, run: Run) -> None:
    result = run("jobs", "rollouts", "one", "--limit", "1")
    assert (result.exit_code, len(listing.requests)) == (0, 1)
    assert re.search(r"^ +1 +1 +0 ", result.stdout, re.M)
    assert not re.search(r"^ +1 +1 +1 ", result.stdout, re.M)
    assert "the first 1 are shown; --limit or --step shows others" in result.stderr
    result = run("jobs", "rollouts", "one", "--limit", "4", "--json")
    assert len(json.loads(result.stdout)) == 4
    assert "shown" not in result.stderr


@pytest.mark.parametrize("step", ["0", "-1", "x"])
def test_a_step_is_a_number_from_1_on(listing: Listing, run: Run, step: str) -> None:
    result = run("jobs", "rollouts", "one", "--step", step)
    assert result.exit_code == 2
    assert "--step" in result.stderr
    assert listing.requests == []


def test_a_job_without_rollouts_says_so(services: Any, run: Run) -> None:
    services.answers["ListRollouts"] = Listing()
    result = run("jobs", "rollouts", "one")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "nothing found" in result.stderr


async def test_the_sdk_goes_through_all_pages(
    listing: Listing, client: Client, async_client: AsyncClient
) -> None:
    assert list(client.jobs.rollouts("one")) == list(listing.rollouts)
    assert list(client.jobs.rollouts(JOB, step=2)) == list(listing.rollouts[2:])
    assert [one async for one in async_client.jobs.rollouts("one", page_size=7)] == list(listing.rollouts)
    assert listing.requests[-1].page_size == 7


def created(services: Any) -> list[FineTuningJob]:
    seen: list[FineTuningJob] = []

    def create(request: Any, context: Any) -> FineTuningJob:
        seen.append(request.fine_tuning_job)
        return FineTuningJob(name=JOB, reinforcement=request.fine_tuning_job.reinforcement)

    services.answers["CreateFineTuningJob"] = create
    return seen


def test_a_job_learns_from_the_rewards_of_a_grader_in_a_file(services: Any, run: Run, tmp_path: Path) -> None:
    seen = created(services)
    (tmp_path / "grader.yaml").write_text(GRADER)
    words = ["--model", "m", "--rendering", "r", "--reinforcement", str(tmp_path / "grader.yaml")]
    result = run("jobs", "create", *words, "--num-samples", "4", "--max-new-tokens", "9", "--batch-rows", "2")
    assert result.exit_code == 0, result.output
    assert re.search(r"method +reinforcement", result.stdout)
    (job,) = seen
    assert job.reinforcement.grader.string_check.reference == "{{item.completion}}"
    assert (job.reinforcement.num_samples, job.reinforcement.max_new_tokens) == (4, 9)
    assert job.hyperparameters.batch_rows == 2


def test_a_grader_in_a_file_takes_the_place_of_the_jobs_own(services: Any, run: Run, tmp_path: Path) -> None:
    seen = created(services)
    (tmp_path / "grader.yaml").write_text(GRADER)
    (tmp_path / "job.yaml").write_text(
        "base_model: m\nrendering: r\nreinforcement:\n  kl_weight: 0.1\n"
        "  grader: {name: old, regex: {input: '{{sample.output_text}}', pattern: a}}\n"
    )
    file = ["-f", str(tmp_path / "job.yaml")]
    assert run("jobs", "create", *file, "--reinforcement", str(tmp_path / "grader.yaml")).exit_code == 0
    assert run("jobs", "create", *file).exit_code == 0
    first, second = seen
    assert first.reinforcement.kl_weight == second.reinforcement.kl_weight == 0.1
    assert (first.reinforcement.grader.name, first.reinforcement.grader.WhichOneof("kind")) == (
        "",
        "string_check",
    )
    assert second.reinforcement.grader.regex.pattern == "a"


@pytest.mark.parametrize("words", [["--preference", "dpo"], ["--reward-model"]])
def test_a_job_has_one_method(services: Any, run: Run, tmp_path: Path, words: list[str]) -> None:
    seen = created(services)
    (tmp_path / "grader.yaml").write_text(GRADER)
    model = ["--model", "m", "--rendering", "r", "--reinforcement", str(tmp_path / "grader.yaml")]
    result = run("jobs", "create", *model, *words)
    assert result.exit_code == 2
    assert "give one of --preference, --reward-model and --reinforcement" in result.stderr
    assert seen == []


@pytest.mark.parametrize("words", [["--preference", "dpo"], ["--reward-model"]])
@pytest.mark.parametrize("flags", [["--num-samples", "4"], ["--max-new-tokens", "9"], []])
def test_no_method_is_replaced_by_another_unsaid(
    services: Any, run: Run, tmp_path: Path, words: list[str], flags: list[str]
) -> None:
    seen = created(services)
    (tmp_path / "job.yaml").write_text("reinforcement: {kl_weight: 0.1}\n")
    file = [] if flags else ["-f", str(tmp_path / "job.yaml")]
    result = run("jobs", "create", *file, "--model", "m", "--rendering", "r", *words, *flags)
    if not flags and words[0] == "--preference":
        # A flag wins over the file, as everywhere.
        assert result.exit_code == 0, result.output
        assert seen[0].WhichOneof("method") == "preference"
        return
    assert result.exit_code == 2
    assert "give one of --preference, --reward-model and --reinforcement" in result.stderr
    assert seen == []


def test_a_grader_that_is_none_is_named_with_its_place(services: Any, run: Run, tmp_path: Path) -> None:
    (tmp_path / "grader.yaml").write_text("string_check: {input: a, operation: equals}\n")
    model = ["--model", "m", "--rendering", "r", "--reinforcement", str(tmp_path / "grader.yaml")]
    result = run("jobs", "create", *model)
    assert result.exit_code == 2
    assert "grader.yaml:1: string_check.operation must be one of EQ, NE, LIKE, ILIKE" in result.stderr


def test_a_plan_says_that_its_tokens_are_the_most_and_how_to_go_on(
    services: Any, run: Run, tmp_path: Path
) -> None:
    def plan(request: Any, context: Any) -> FineTuningPlan:
        return FineTuningPlan(num_tokens=900, num_supervised_tokens=80, resolved_job=request.fine_tuning_job)

    services.answers["PlanFineTuningJob"] = plan
    grader = tmp_path / "my grader.yaml"
    grader.write_text(GRADER)
    result = run("jobs", "plan", "--model", "m", "--rendering", "r", "--reinforcement", str(grader))
    assert result.exit_code == 0, result.output
    assert re.search(r"tokens +at most 900, of which 80 are learnt", result.stdout)
    assert f"jobs create --model m --rendering r --reinforcement '{grader}'" in result.stderr
