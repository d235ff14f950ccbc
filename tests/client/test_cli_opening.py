"""Pages of jobs and evaluations in the browser."""

from __future__ import annotations

import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import Result

from luthier.v1.evaluation_pb2 import Evaluation
from luthier.v1.evaluation_service_pb2 import ListPredictionsResponse
from luthier.v1.fine_tuning_job_pb2 import FineTuningJob, MetricPoint
from luthier.v1.training_service_pb2 import ReadFineTuningJobMetricsResponse

Run = Callable[..., Result]


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """What the browser was told to open."""
    found: list[str] = []

    def launch(url: str) -> int:
        found.append(url)
        return 0

    monkeypatch.setattr(click, "launch", launch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return found


def test_a_job_is_opened_with_its_curve(services: Any, run: Run, opened: list[str], tmp_path: Path) -> None:
    services.answers["GetFineTuningJob"] = lambda request, context: FineTuningJob(
        name=request.name, display_name="<Support>", state=FineTuningJob.STATE_RUNNING
    )
    services.answers["ReadFineTuningJobMetrics"] = lambda request, context: ReadFineTuningJobMetricsResponse(
        points=[MetricPoint(step=step, values={"train_loss": 3.0 - step}) for step in (1, 2)]
    )
    result = run("jobs", "open", "one")
    assert result.exit_code == 0, result.output
    path = Path(result.stdout.strip())
    assert (opened, path.parent) == ([path.as_uri()], tmp_path / "cache" / "luthier" / "pages")
    page = path.read_text()
    assert "<h1>&lt;Support&gt;</h1><p>RUNNING</p>" in page
    assert "<svg" in page
    assert page.rstrip().endswith("</html>")
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_an_evaluation_is_opened_as_its_report(services: Any, run: Run, opened: list[str]) -> None:
    services.answers["GetEvaluation"] = lambda request, context: Evaluation(
        name=request.name, display_name="Which?"
    )
    services.answers["ListPredictions"] = lambda request, context: ListPredictionsResponse()
    result = run("evaluations", "open", "e")
    assert result.exit_code == 0, result.output
    assert "<h1>Which?</h1>" in Path(result.stdout.strip()).read_text()
    assert len(opened) == 1


def test_without_a_browser_the_file_is_named(
    services: Any, run: Run, opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    del opened
    monkeypatch.setattr(click, "launch", lambda url: 1)
    services.answers["ReadFineTuningJobMetrics"] = lambda request, context: ReadFineTuningJobMetricsResponse()
    result = run("jobs", "open", "one")
    assert result.exit_code == 0, result.output
    assert "no browser could be started; open the file yourself" in result.stderr
    assert Path(result.stdout.strip()).exists()
