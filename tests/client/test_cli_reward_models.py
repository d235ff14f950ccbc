"""Reward models that a grader's file names by their short names, on the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from tests.client.creating import Creating

from luthier.client import Client
from luthier.grading.asked import reward_model_names
from luthier.v1.evaluation_pb2 import Evaluation
from luthier.v1.evaluation_service_pb2 import GradeSamplesResponse
from luthier.v1.grader_pb2 import Grader, MultiGrader, RewardModelGrader, Sample, SampleGrade

Run = Callable[..., Result]
MODELS = "projects/default/models"
ALONE = "reward_model: {model: helpful}\n"
CHECKPOINT = "reward_model: {model: judge/step-4}\n"
WITHIN = f"""
multi:
  graders:
    helpful: {{reward_model: {{model: helpful}}}}
    safe: {{reward_model: {{model: {MODELS}/safe}}}}
    both: {{multi: {{graders: {{a: {{reward_model: {{model: other}}}}}}, calculate_output: a}}}}
  calculate_output: helpful + safe + both
"""


@pytest.mark.parametrize(
    ("text", "names"),
    [
        (ALONE, ["models/helpful"]),
        (CHECKPOINT, ["fineTuningJobs/judge/checkpoints/step-4"]),
        (WITHIN, ["models/other", "models/helpful", "models/safe"]),
    ],
    ids=["alone", "checkpoint", "multi"],
)
@pytest.mark.parametrize("command", ["create", "plan"])
def test_reinforcement_names_reward_models_of_the_project(
    services: Any, run: Run, tmp_path: Path, command: str, text: str, names: list[str]
) -> None:
    creating = Creating(services)
    path = tmp_path / "grader.yaml"
    path.write_text(text)
    result = run("jobs", command, "--model", "m", "--rendering", "r", "--reinforcement", str(path))
    assert result.exit_code == 0, result.output
    method = "CreateFineTuningJob" if command == "create" else "PlanFineTuningJob"
    grader = creating.one(method).fine_tuning_job.reinforcement.grader
    assert [name for _, name in reward_model_names(grader, "")] == [
        f"projects/default/{name}" for name in names
    ]


def deep() -> Grader:
    alone = Grader(name="g", reward_model=RewardModelGrader(model="judge/step-4"))
    return Grader(name="deep", multi=MultiGrader(graders={"a": alone}, calculate_output="a"))


def test_graders_of_evaluations_and_of_trials_name_them_too(services: Any, client: Client) -> None:
    asked: list[Any] = []
    grader = deep()

    def create(request: Any, context: Any) -> Evaluation:
        asked.append(request.evaluation.graders[0])
        return Evaluation(name="projects/default/evaluations/e")

    def grade(request: Any, context: Any) -> Any:
        asked.append(request.grader)
        yield GradeSamplesResponse(grades=[SampleGrade(score=1)])

    services.answers["CreateEvaluation"], services.answers["GradeSamples"] = create, grade
    client.evaluations.create(Evaluation(dataset_version="d/v", graders=[grader]))
    assert len(list(client.evaluations.grade(grader, [Sample(output_text="a")]))) == 1
    for one in asked:
        assert [name for _, name in reward_model_names(one, "")] == [
            "projects/default/fineTuningJobs/judge/checkpoints/step-4"
        ]
    assert grader == deep(), "what is given stays as it was"
