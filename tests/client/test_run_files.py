"""A run's metrics as TensorBoard reads them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from luthier.client.run_files import write_tensorboard
from luthier.errors import FailedPrecondition
from luthier.v1.fine_tuning_job_pb2 import FineTuningJob, Hyperparameters, MetricPoint
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
