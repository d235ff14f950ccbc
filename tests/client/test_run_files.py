"""A run's metrics as TensorBoard reads them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from google.protobuf.timestamp_pb2 import Timestamp
from mlflow.tracking import MlflowClient
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from luthier.client.config import prepare_mlflow
from luthier.client.run_files import write_mlflow, write_tensorboard
from luthier.errors import FailedPrecondition
from luthier.v1.fine_tuning_job_pb2 import FineTuningJob, Hyperparameters, LoraConfig, MetricPoint
from luthier.v1.training_service_pb2 import ReadFineTuningJobMetricsResponse

JOB = FineTuningJob(
    name="projects/default/fineTuningJobs/one", hyperparameters=Hyperparameters(learning_rate=1e-4)
)
POINTS = [
    MetricPoint(step=1, values={"train_loss": 2.5, "grad_norm": 0.5}),
    MetricPoint(step=2, values={"train_loss": 2.25, "grad_norm": 0.25, "validation_loss": 3.0}),
]


def test_tensorboard_reads_every_value_by_step(
    services: Any, run: Callable[..., Result], tmp_path: Path
) -> None:
    services.answers["GetFineTuningJob"] = lambda request, context: JOB
    services.answers["ReadFineTuningJobMetrics"] = lambda request, context: ReadFineTuningJobMetricsResponse(
        points=POINTS
    )
    folder = tmp_path / "runs" / "one"
    result = run("jobs", "tensorboard", "one", str(folder))
    assert result.exit_code == 0, result.output
    assert (result.stdout.strip(), "5 values" in result.stderr) == (str(folder), True)
    found = EventAccumulator(str(folder))
    found.Reload()
    read = {tag: [(one.step, one.value) for one in found.Scalars(tag)] for tag in found.Tags()["scalars"]}
    assert read == {
        "train_loss": [(1, 2.5), (2, 2.25)],
        "grad_norm": [(1, 0.5), (2, 0.25)],
        "validation_loss": [(2, 3.0)],
    }
    (text,) = found.Tensors("settings")
    assert b"learning_rate" in text.tensor_proto.string_val[0]
    again = run("jobs", "tensorboard", "one", str(folder))
    assert again.exit_code == 1
    assert "holds something: give a new or an empty folder" in again.stderr


def test_without_tensorboard_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tensorboard.summary.writer.event_file_writer", None)
    with pytest.raises(FailedPrecondition, match=r"pip install 'luthier-client\[tensorboard\]'"):
        write_tensorboard(JOB, POINTS, tmp_path / "one")
    assert not (tmp_path / "one").exists()


ENDED = FineTuningJob(
    name="projects/default/fineTuningJobs/one",
    uid="0b9e",
    state=FineTuningJob.STATE_SUCCEEDED,
    base_model="projects/default/models/tiny",
    lora=LoraConfig(rank=8, target_modules=["q_proj", "v_proj"]),
    hyperparameters=Hyperparameters(learning_rate=1e-4),
    tuned_model="projects/default/models/one",
    start_time=Timestamp(seconds=1000),
    end_time=Timestamp(seconds=1060),
)


def test_mlflow_reads_every_value_by_step(services: Any, run: Callable[..., Result], tmp_path: Path) -> None:
    services.answers["GetFineTuningJob"] = lambda request, context: ENDED
    services.answers["ReadFineTuningJobMetrics"] = lambda request, context: ReadFineTuningJobMetricsResponse(
        points=POINTS
    )
    folder = tmp_path / "mlruns"
    result = run("jobs", "mlflow", "one", str(folder))
    assert result.exit_code == 0, result.output
    assert (result.stdout.strip(), "5 values" in result.stderr) == (str(folder), True)
    client = MlflowClient(tracking_uri=folder.as_uri())
    experiment = client.get_experiment_by_name("default")
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id])
    history = {
        name: [(one.step, one.value) for one in client.get_metric_history(found.info.run_id, name)]
        for name in found.data.metrics
    }
    assert history == {
        "train_loss": [(1, 2.5), (2, 2.25)],
        "grad_norm": [(1, 0.5), (2, 0.25)],
        "validation_loss": [(2, 3.0)],
    }
    assert found.data.params == {
        "base_model": "projects/default/models/tiny",
        "hyperparameters.learning_rate": "0.0001",
        "lora.rank": "8",
        "lora.target_modules": '["q_proj", "v_proj"]',
    }
    assert (found.info.run_name, found.info.status) == ("one", "FINISHED")
    assert (found.info.start_time, found.info.end_time) == (1_000_000, 1_060_000)
    assert found.data.tags["luthier.model"] == "projects/default/models/one"
    again = run("jobs", "mlflow", "one", str(folder))
    assert again.exit_code == 1
    assert "has a run of projects/default/fineTuningJobs/one already" in again.stderr


@pytest.mark.parametrize(
    ("state", "status"),
    [
        (FineTuningJob.STATE_FAILED, "FAILED"),
        (FineTuningJob.STATE_CANCELLED, "KILLED"),
        (FineTuningJob.STATE_RUNNING, "RUNNING"),
    ],
)
def test_a_run_of_mlflow_ends_as_its_job_did(
    tmp_path: Path, state: FineTuningJob.State.ValueType, status: str
) -> None:
    job = FineTuningJob()
    job.CopyFrom(ENDED)
    job.state = state
    if state == FineTuningJob.STATE_RUNNING:
        job.ClearField("end_time")
    many = [MetricPoint(step=step, values={"train_loss": 1 / step}) for step in range(1, 2301)]
    assert write_mlflow(job, many, tmp_path / "mlruns") == 2300
    client = MlflowClient(tracking_uri=(tmp_path / "mlruns").as_uri())
    (experiment,) = (one for one in client.search_experiments() if one.name == "default")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == status
    history = client.get_metric_history(found.info.run_id, "train_loss")
    assert [one.step for one in history] == list(range(1, 2301))


def test_without_mlflow_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "mlflow.tracking", None)
    with pytest.raises(FailedPrecondition, match=r"pip install 'luthier-client\[mlflow\]'"):
        write_mlflow(ENDED, POINTS, tmp_path / "mlruns")
    assert not (tmp_path / "mlruns").exists()


def test_mlflow_is_told_what_the_user_has_not_said_himself() -> None:
    environ: dict[str, str] = {}
    prepare_mlflow(environ)
    assert environ == {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_ALLOW_FILE_STORE": "true"}
    asked = {"MLFLOW_DISABLE_TELEMETRY": "false", "MLFLOW_ALLOW_FILE_STORE": "false"}
    prepare_mlflow(asked)
    assert set(asked.values()) == {"false"}
