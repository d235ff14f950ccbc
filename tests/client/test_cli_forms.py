"""What commands write for programs: JSON, YAML and names, of one resource, of several, and of streams."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import Result

from luthier.client.cli import forms
from luthier.client.message_files import read_message
from luthier.v1.event_pb2 import Event, LogLine, StateChange
from luthier.v1.fine_tuning_job_pb2 import FineTuningJob, Hyperparameters, MetricPoint, RunRecord
from luthier.v1.training_service_pb2 import (
    ListFineTuningJobsResponse,
    ReadFineTuningJobMetricsResponse,
)

Run = Callable[..., Result]
PARENT = "projects/default/fineTuningJobs"
JOBS = [
    FineTuningJob(
        name=f"{PARENT}/{name}",
        state=FineTuningJob.STATE_SUCCEEDED,
        base_model="projects/default/models/m",
        rendering="projects/default/renderings/r",
        hyperparameters=Hyperparameters(learning_rate=1e-4),
        run_record=RunRecord(kernels={"rms_norm": "cpp avx2", "linear": "eager"}),
        labels={"when": "2026-11-29", "is": "yes"},
    )
    for name in ("one", "two")
]


@pytest.fixture
def run_jobs(services: Any, run: Run) -> Run:
    def watch(request: Any, context: Any) -> Iterator[Event]:
        yield Event(sequence=1, log=LogLine(severity=LogLine.SEVERITY_INFO, text="begun"))
        yield Event(sequence=2, state_change=StateChange(state="SUCCEEDED"))

    services.answers |= {
        "GetFineTuningJob": lambda request, context: JOBS[0],
        "CancelFineTuningJob": lambda request, context: JOBS[0],
        "DeleteFineTuningJob": lambda request, context: JOBS[0],
        "WatchFineTuningJob": watch,
        "ListFineTuningJobs": lambda request, context: ListFineTuningJobsResponse(fine_tuning_jobs=JOBS),
        "ReadFineTuningJobMetrics": lambda request, context: ReadFineTuningJobMetricsResponse(
            points=[MetricPoint(step=1, values={"train_loss": 2.0})]
        ),
    }
    return run


@pytest.mark.parametrize(
    "words",
    [
        ("jobs", "show", "one", "-o", "yaml"),
        ("-o", "yaml", "jobs", "show", "one"),
        ("jobs", "cancel", "one", "--output-form", "yaml"),
        ("jobs", "delete", "one", "-o", "yaml"),
    ],
)
def test_yaml_is_the_message_and_can_be_given_back(run_jobs: Run, words: tuple[str, ...]) -> None:
    result = run_jobs(*words)
    assert result.exit_code == 0, result.output
    as_json = json.loads(run_jobs("jobs", "show", "one", "--json").stdout)
    assert yaml.safe_load(result.stdout) == as_json
    assert read_message(result.stdout.encode(), FineTuningJob, source="-").message.labels == JOBS[0].labels
    assert "next:" not in result.stderr


def test_what_is_written_as_yaml_makes_the_same_job_again(
    services: Any, run_jobs: Run, tmp_path: Path
) -> None:
    asked: list[Any] = []

    def create(request: Any, context: Any) -> FineTuningJob:
        asked.append(request.fine_tuning_job)
        return JOBS[0]

    services.answers["CreateFineTuningJob"] = create
    (file := tmp_path / "job.yaml").write_text(run_jobs("jobs", "show", "one", "-o", "yaml").stdout)
    result = run_jobs("jobs", "create", "-f", str(file), "-o", "name")
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{PARENT}/one\n"
    assert asked[0].hyperparameters.learning_rate == 1e-4
    assert dict(asked[0].labels) == {"when": "2026-11-29", "is": "yes"}


def test_a_list_is_an_array_in_yaml_and_lines_of_names(run_jobs: Run) -> None:
    listed = yaml.safe_load(run_jobs("jobs", "list", "-o", "yaml").stdout)
    assert [one["name"] for one in listed] == [job.name for job in JOBS]
    assert run_jobs("jobs", "list", "-o", "name").stdout == f"{PARENT}/one\n{PARENT}/two\n"


def test_an_empty_list_of_names_is_nothing_at_all(services: Any, run_jobs: Run) -> None:
    services.answers["ListFineTuningJobs"] = lambda request, context: ListFineTuningJobsResponse()
    assert run_jobs("jobs", "list", "-o", "name").stdout == ""
    assert yaml.safe_load(run_jobs("jobs", "list", "-o", "yaml").stdout) == []


def test_a_stream_is_documents_in_yaml(run_jobs: Run) -> None:
    result = run_jobs("jobs", "watch", "one", "-o", "yaml")
    assert result.exit_code == 0, result.output
    found = list(yaml.safe_load_all(result.stdout))
    assert [one["sequence"] for one in found] == ["1", "2"]


def test_names_of_what_is_watched_come_when_it_is_done(run_jobs: Run) -> None:
    result = run_jobs("jobs", "watch", "one", "-o", "name")
    assert (result.exit_code, result.stdout) == (0, f"{PARENT}/one\n")


def test_what_has_no_name_says_so(run_jobs: Run) -> None:
    result = run_jobs("jobs", "metrics", "one", "-o", "name")
    assert result.exit_code == 2
    assert "-o name is for what has a name: a MetricPoint has none" in result.stderr


def test_wide_has_all_details(run_jobs: Run) -> None:
    assert "rms_norm" not in run_jobs("jobs", "show", "one").stdout
    assert "rms_norm" in run_jobs("jobs", "show", "one", "-o", "wide").stdout
    assert "rms_norm" in run_jobs("-o", "wide", "jobs", "show", "one").stdout


def test_a_form_that_is_none_is_refused(run_jobs: Run) -> None:
    result = run_jobs("jobs", "list", "-o", "xml")
    assert result.exit_code == 2
    assert "'wide', 'json', 'yaml', 'name'" in result.stderr


def test_yaml_cannot_steer_a_terminal() -> None:
    hostile = FineTuningJob(display_name="Äpfel \x1b[31m red \u202e turned")
    text = forms.one(hostile, "yaml")
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert yaml.safe_load(text)["display_name"] == hostile.display_name
    assert "Äpfel" in forms.one(FineTuningJob(display_name="Äpfel"), "yaml")
