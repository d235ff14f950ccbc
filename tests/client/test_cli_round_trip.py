"""What the command line prints of a resource, its `create` takes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from google.api import field_behavior_pb2
from tests.client.creating import Creating

from luthier.v1.dataset_pb2 import (
    DATASET_FORMAT_ALPACA,
    INVALID_RECORD_POLICY_SKIP,
    SPLIT_TEST,
    SPLIT_TRAIN,
    DatasetVersion,
)
from luthier.v1.evaluation_pb2 import (
    EVALUATION_METRIC_PERPLEXITY,
    Evaluation,
    EvaluationArm,
)
from luthier.v1.fine_tuning_job_pb2 import FineTuningJob, FineTuningPlan
from luthier.v1.rendering_pb2 import MASK_MODE_LAST_TURN, Rendering

Run = Callable[..., Result]
PARENT = "projects/default"
VERSION = f"{PARENT}/datasets/mine/versions/v1"


@pytest.fixture
def creating(services: Any) -> Creating:
    return Creating(services)


JOB_SHOWN = FineTuningJob(
    name=f"{PARENT}/fineTuningJobs/old",
    uid="u",
    etag='"3"',
    state=FineTuningJob.STATE_SUCCEEDED,
    base_model=f"{PARENT}/models/m",
    rendering=f"{PARENT}/renderings/r",
    tuned_model_id="old",
    tuned_model=f"{PARENT}/models/old",
    labels={"a": "b"},
    num_attempts=2,
    latest_metrics={"train_loss": 0.5},
    max_checkpoints=3,
)
JOB_SHOWN.hyperparameters.learning_rate = 2e-4
JOB_SHOWN.hyperparameters.max_steps = 2**40
JOB_SHOWN.create_time.GetCurrentTime()
JOB_SHOWN.run_record.kernels["a"] = "b"
RENDERING_SHOWN = Rendering(
    name=f"{PARENT}/renderings/old",
    state=Rendering.STATE_READY,
    dataset_version=VERSION,
    model=f"{PARENT}/models/m",
    chat_template="{{ messages }}\n{# \u2028 \x9b é 😀 #}",
    mask_mode=MASK_MODE_LAST_TURN,
    max_tokens=512,
    stop_token_ids=[1, 2],
)
EVALUATION_SHOWN = Evaluation(
    name=f"{PARENT}/evaluations/old",
    state=Evaluation.STATE_FAILED,
    dataset_version=VERSION,
    split=SPLIT_TRAIN,
    arms=[EvaluationArm(arm_id="a", model=f"{PARENT}/models/m", num_shots=3)],
    metrics=[EVALUATION_METRIC_PERPLEXITY],
    model_digests={"m": "d"},
)
EVALUATION_SHOWN.error.message = "no"
RENDERING_SHOWN.split_statistics.add(num_records=2)
VERSION_SHOWN = DatasetVersion(
    name=VERSION,
    state=DatasetVersion.STATE_READY,
    digest="d",
    invalid_record_policy=INVALID_RECORD_POLICY_SKIP,
)
VERSION_SHOWN.sources.add(
    upload=f"{PARENT}/uploads/u", split=SPLIT_TEST, filename="a.jsonl", detected_format=DATASET_FORMAT_ALPACA
)
VERSION_SHOWN.split_settings.seed = 2**60


SHOWN = {
    "jobs": (JOB_SHOWN, "FineTuningJob", "fine_tuning_job"),
    "renderings": (RENDERING_SHOWN, "Rendering", "rendering"),
    "evaluations": (EVALUATION_SHOWN, "Evaluation", "evaluation"),
    "datasets": (VERSION_SHOWN, "DatasetVersion", "dataset_version"),
}


@pytest.mark.parametrize("group", SHOWN)
def test_what_json_prints_is_taken_by_create(
    services: Any, creating: Creating, run: Run, tmp_path: Path, group: str
) -> None:
    shown, kind, field = SHOWN[group]
    services.answers[f"Get{kind}"] = lambda request, context: shown
    path = tmp_path / "shown.json"
    name = "mine/v1" if group == "datasets" else "old"
    path.write_text(run("--json", group, "show", name).stdout, encoding="utf-8")
    result = run(group, "create", "-f", str(path), "--name", "new")
    assert result.exit_code == 0, result.output
    assert f"{path}: not taken, as the service writes it itself: name, " in result.stderr
    wanted = type(shown)()
    for one in type(shown).DESCRIPTOR.fields:
        if _is_set(shown, one) and not _is_the_services(one):
            wanted.MergeFrom(type(shown)(**{one.name: getattr(shown, one.name)}))
    if isinstance(wanted, FineTuningJob):
        # Made by the service of the old job's name.
        wanted.tuned_model_id = ""
    if isinstance(wanted, DatasetVersion):
        wanted.sources[0].ClearField("filename")
        wanted.sources[0].ClearField("detected_format")
    assert getattr(creating.one(f"Create{kind}"), field) == wanted


def _is_the_services(field: Any) -> bool:
    behaviors = field.GetOptions().Extensions[field_behavior_pb2.field_behavior]
    return bool({field_behavior_pb2.OUTPUT_ONLY, field_behavior_pb2.IDENTIFIER} & set(behaviors))


def _is_set(message: Any, field: Any) -> bool:
    return any(one.name == field.name for one, _ in message.ListFields())


def test_a_tuned_model_that_was_named_on_purpose_stays(services: Any, creating: Creating, run: Run) -> None:
    shown = FineTuningJob()
    shown.CopyFrom(JOB_SHOWN)
    shown.tuned_model_id = "mine"
    services.answers["GetFineTuningJob"] = lambda request, context: shown
    text = run("jobs", "show", "old", "--json").stdout
    assert run("jobs", "create", "-f", "-", "--name", "new", stdin=text).exit_code == 0
    assert creating.one("CreateFineTuningJob").fine_tuning_job.tuned_model_id == "mine"
    assert run("jobs", "create", "-f", "-", "--tuned-model", "t", stdin=text).exit_code == 0
    assert creating.requests["CreateFineTuningJob"][1].fine_tuning_job.tuned_model_id == "t"


def test_the_resolved_job_of_a_plan_is_taken(services: Any, creating: Creating, run: Run) -> None:
    services.answers["PlanFineTuningJob"] = lambda request, context: FineTuningPlan(
        num_steps=3, resolved_job=JOB_SHOWN
    )
    plan = run("jobs", "plan", "--model", "m", "--rendering", "r", "--json").stdout
    text = json.dumps(json.loads(plan)["resolved_job"])
    assert run("jobs", "create", "-f", "-", stdin=text).exit_code == 0
    assert creating.one("CreateFineTuningJob").fine_tuning_job.hyperparameters.max_steps == 2**40
    refused = run("jobs", "create", "-f", "-", stdin=plan)
    assert refused.exit_code == 2
    assert "num_steps is no field of FineTuningJob" in refused.stderr
