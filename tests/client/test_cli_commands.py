"""The commands of `luthier` against fake services: what they send and what they write where."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from click.testing import Result

from luthier.v1.data_service_pb2 import (
    ListDatasetVersionErrorsResponse,
    PreviewRenderingResponse,
)
from luthier.v1.dataset_pb2 import (
    SPLIT_TEST,
    SPLIT_TRAIN,
    Dataset,
    DatasetStatistics,
    DatasetVersion,
    RecordError,
    SplitStatistics,
)
from luthier.v1.event_pb2 import AttemptChange, Event, MetricValues, Progress, StateChange
from luthier.v1.fine_tuning_job_pb2 import FineTuningJob, FineTuningPlan, FullConfig, LoraConfig, MetricPoint
from luthier.v1.model_pb2 import Model
from luthier.v1.rendering_pb2 import (
    LENGTH_POLICY_TRUNCATE,
    MASK_MODE_LAST_TURN,
    RenderedRow,
    RenderedToken,
    Rendering,
)
from luthier.v1.training_service_pb2 import ReadFineTuningJobMetricsResponse
from luthier.v1.upload_pb2 import Upload

Run = Callable[..., Result]
VERSION = "projects/default/datasets/mine/versions/v1"


def _refusing(services: Any, code: grpc.StatusCode, **details: Any) -> Callable[..., None]:
    return lambda request, context: services.refuse(context, code, "it is so", **details)


class DataFake:
    """Takes one upload and builds one version of it."""

    def __init__(self, services: Any, version: DatasetVersion) -> None:
        self.uploads: dict[str, Upload] = {}
        self.requests: list[Any] = []
        self.version = version
        state = DatasetVersion.State.Name(version.state).removeprefix("STATE_")
        final = Event(sequence=1, state_change=StateChange(state=state))
        services.answers.update(
            CreateDataset=lambda request, context: Dataset(
                name=f"{request.parent}/datasets/{request.dataset_id}"
            ),
            StartUpload=self.start,
            WriteUpload=self.write,
            CreateDatasetVersion=self.create,
            WatchDatasetVersion=lambda request, context: iter([final]),
            GetDatasetVersion=lambda request, context: self.version,
        )

    def start(self, request: Any, context: Any) -> Upload:
        name = f"projects/default/uploads/u{len(self.uploads)}"
        upload = Upload(name=name, filename=request.upload.filename, state=Upload.STATE_RECEIVING)
        self.uploads[name] = upload
        return upload

    def write(self, requests: Iterator[Any], context: Any) -> Upload:
        chunks = list(requests)
        upload = self.uploads[chunks[0].name]
        upload.state = Upload.STATE_COMPLETE
        return upload

    def create(self, request: Any, context: Any) -> DatasetVersion:
        self.requests.append(request)
        return DatasetVersion(name=VERSION, state=DatasetVersion.STATE_QUEUED)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n')
    return path


def test_datasets_create_uploads_builds_and_shows_statistics(services: Any, run: Run, file: Path) -> None:
    statistics = DatasetStatistics(
        num_records=40,
        num_records_read=42,
        num_duplicates=2,
        splits=[SplitStatistics(split=SPLIT_TRAIN, num_records=40)],
    )
    fake = DataFake(
        services, DatasetVersion(name=VERSION, state=DatasetVersion.STATE_READY, statistics=statistics)
    )
    words = (
        "datasets",
        "create",
        str(file),
        "--validation",
        "0.1",
        "--split",
        f"test={file}",
        "--policy",
        "skip",
    )
    result = run(*words)
    assert result.exit_code == 0, result.stderr
    request = fake.requests[0]
    assert request.parent == "projects/default/datasets/mine"
    assert [(source.upload, source.split) for source in request.dataset_version.sources] == [
        ("projects/default/uploads/u0", 0),
        ("projects/default/uploads/u1", SPLIT_TEST),
    ]
    assert request.dataset_version.split_settings.validation_fraction == 0.1
    assert request.dataset_version.invalid_record_policy == 2
    assert re.search(r"duplicates +2", result.stdout)
    assert re.search(r"train +40", result.stdout)
    assert "upload mine.jsonl: u0: 35 B" in result.stderr
    assert "next: luthier renderings create mine/v1 --model MODEL" in result.stderr


def test_datasets_create_lists_bad_records_and_ends_with_6(services: Any, run: Run, file: Path) -> None:
    failed = DatasetVersion(name=VERSION, state=DatasetVersion.STATE_FAILED)
    failed.error.code, failed.error.message = 3, "1 of 2 records is not valid"
    DataFake(services, failed)
    bad = RecordError(
        filename="mine.jsonl", line=2, path="completion", reason="MISSING_FIELD", message="must be there"
    )
    services.answers["ListDatasetVersionErrors"] = lambda request, context: ListDatasetVersionErrorsResponse(
        errors=[bad]
    )
    result = run("datasets", "create", str(file))
    assert result.exit_code == 6
    assert re.search(r"mine\.jsonl:2 +completion +MISSING_FIELD +must be there", result.stderr)
    assert "1 of 2 records is not valid" in result.stderr


def test_datasets_create_says_how_to_take_a_broken_upload_up(services: Any, run: Run, file: Path) -> None:
    DataFake(services, DatasetVersion())
    services.answers["WriteUpload"] = _refusing(services, grpc.StatusCode.INTERNAL, reason="INTERNAL")
    result = run("datasets", "create", str(file))
    assert result.exit_code == 1
    assert "--resume u0" in result.stderr


def _job_events(state: str) -> list[Event]:
    return [
        Event(sequence=1, state_change=StateChange(state="RUNNING")),
        Event(
            sequence=2, metrics=MetricValues(values={"train_loss": 1.25, "tokens_per_second": 900.0}), step=4
        ),
        Event(
            sequence=3,
            step=4,
            progress=Progress(phase="training", completed=3, total=4, unit="steps", remaining_seconds=75),
        ),
        Event(sequence=4, state_change=StateChange(state=state)),
    ]


def _job(services: Any, state: str) -> None:
    job = FineTuningJob(
        name="projects/default/fineTuningJobs/j", state=FineTuningJob.State.Value(f"STATE_{state}")
    )
    if state == "FAILED":
        job.error.code, job.error.message = 9, "the loss is not finite"
    services.answers["WatchFineTuningJob"] = lambda request, context: iter(_job_events(state))
    services.answers["GetFineTuningJob"] = lambda request, context: job


def test_jobs_watch_writes_plain_lines_off_a_terminal(services: Any, run: Run) -> None:
    _job(services, "SUCCEEDED")
    result = run("jobs", "watch", "j")
    assert result.exit_code == 0
    assert result.stderr.splitlines()[:3] == [
        "j: RUNNING",
        "j: training 3/4 steps  loss 1.25  tok/s 900  ETA 1:15",
        "j: SUCCEEDED",
    ]
    assert "\x1b" not in result.output


def test_jobs_watch_repeats_no_position(services: Any, run: Run) -> None:
    _job(services, "SUCCEEDED")
    started = Event(sequence=2, attempt_change=AttemptChange(kind=AttemptChange.KIND_STARTED, worker="w"))
    done = Progress(phase="training", completed=4, total=4, unit="steps")
    events = [_job_events("SUCCEEDED")[0], started, *(Event(sequence=n, progress=done) for n in (3, 4))]
    services.answers["WatchFineTuningJob"] = lambda request, context: iter(events)
    lines = run("jobs", "watch", "j").stderr.splitlines()
    assert lines[:2] == ["j: RUNNING", "j: training 4/4 steps"]
    assert lines[2].startswith("next:")


def test_jobs_watch_of_a_failed_job_ends_with_6(services: Any, run: Run) -> None:
    _job(services, "FAILED")
    result = run("jobs", "watch", "j")
    assert result.exit_code == 6
    assert "j is FAILED: the loss is not finite" in result.stderr


def test_jobs_watch_json_writes_an_event_a_line(services: Any, run: Run) -> None:
    _job(services, "SUCCEEDED")
    result = run("jobs", "watch", "j", "--json")
    events = [json.loads(line) for line in result.stdout.splitlines()]
    assert [event["sequence"] for event in events] == ["1", "2", "3", "4"]
    assert events[0]["state_change"] == {"state": "RUNNING"}
    assert result.stderr == ""


def test_jobs_plan_sends_what_was_given_and_nothing_else(services: Any, run: Run) -> None:
    seen: list[Any] = []

    def plan(request: Any, context: Any) -> FineTuningPlan:
        seen.append(request.fine_tuning_job)
        return FineTuningPlan(num_steps=41, num_train_rows=500, num_unsupervised=3, warnings=["few rows"])

    services.answers["PlanFineTuningJob"] = plan
    result = run("jobs", "plan", "--model", "m", "--rendering", "r", "--rank", "0", "--batch-rows", "8")
    assert result.exit_code == 0, result.output
    job = seen[0]
    assert job.lora.HasField("rank")
    assert job.lora.rank == 0
    assert not job.lora.HasField("alpha")
    assert job.hyperparameters.WhichOneof("batch_size") == "batch_rows"
    assert not job.hyperparameters.HasField("learning_rate")
    assert "3 with nothing to learn" in result.stdout
    assert "warning: few rows" in result.stdout


@pytest.mark.parametrize(
    ("adaptation", "words"),
    [
        ({"lora": LoraConfig(rank=16)}, "an adapter of rank 16"),
        (
            {"lora": LoraConfig(rank=16, rank_pattern={"q": 8, "v": 64}, trained_modules=["embed_tokens"])},
            "an adapter of rank 8 to 64, embed_tokens",
        ),
        ({"full": FullConfig()}, "all weights"),
    ],
)
def test_jobs_show_says_what_is_trained(
    services: Any, run: Run, adaptation: dict[str, Any], words: str
) -> None:
    services.answers["GetFineTuningJob"] = lambda request, context: FineTuningJob(
        name="projects/default/fineTuningJobs/j", **adaptation
    )
    (line,) = (line for line in run("jobs", "show", "j").stdout.splitlines() if line.startswith("trains"))
    assert line.split(maxsplit=1)[1] == words


def test_jobs_show_says_that_nobody_can_do_it(services: Any, run: Run) -> None:
    job = FineTuningJob(name="projects/default/fineTuningJobs/j", state=FineTuningJob.STATE_QUEUED)
    job.waiting.message = "no worker that is there can do it: it requires a CUDA device"
    services.answers["GetFineTuningJob"] = lambda request, context: job
    (line,) = (line for line in run("jobs", "show", "j").stdout.splitlines() if line.startswith("waiting"))
    assert line.split(maxsplit=1)[1] == job.waiting.message


def test_jobs_metrics_is_a_table_by_step(services: Any, run: Run) -> None:
    points = [
        MetricPoint(step=1, values={"train_loss": 2.5}),
        MetricPoint(step=2, values={"train_loss": 2.25, "validation_loss": 2.4}),
    ]
    services.answers["ReadFineTuningJobMetrics"] = lambda request, context: ReadFineTuningJobMetricsResponse(
        points=points
    )
    lines = [line.split() for line in run("jobs", "metrics", "j").stdout.splitlines()]
    assert lines == [["STEP", "TRAIN_LOSS", "VALIDATION_LOSS"], ["1", "2.5"], ["2", "2.25", "2.4"]]


def test_renderings_create_sends_the_settings(services: Any, run: Run, tmp_path: Path) -> None:
    template = tmp_path / "t.jinja"
    template.write_text("{{ messages }}")
    seen: list[Rendering] = []

    def create(request: Any, context: Any) -> Rendering:
        seen.append(request.rendering)
        return Rendering(name="projects/default/renderings/r")

    ready = Rendering(
        name="projects/default/renderings/r", state=Rendering.STATE_READY, warnings=["no end of turn"]
    )
    services.answers.update(
        CreateRendering=create,
        WatchRendering=lambda request, context: iter(()),
        GetRendering=lambda request, context: ready,
    )
    words = (
        "--mask",
        "last-turn",
        "--max-tokens",
        "512",
        "--length-policy",
        "truncate",
        "--template",
        str(template),
    )
    result = run("renderings", "create", "mine/v1", "--model", "m", *words)
    assert result.exit_code == 0, result.output
    assert seen[0] == Rendering(
        dataset_version=VERSION,
        model="projects/default/models/m",
        mask_mode=MASK_MODE_LAST_TURN,
        max_tokens=512,
        length_policy=LENGTH_POLICY_TRUNCATE,
        chat_template="{{ messages }}",
    )
    assert "warning: no end of turn" in result.stdout


def test_preview_shows_learnt_tokens_in_green_and_special_ones_inverse() -> None:
    from luthier.client.cli.renderings import row_text

    row = RenderedRow(
        tokens=[
            RenderedToken(text="<|im_start|>"),
            RenderedToken(text="hi"),
            RenderedToken(text="\n"),
            RenderedToken(text="yes", supervised=True),
            RenderedToken(text="<|im_end|>", supervised=True),
        ]
    )
    text = row_text(row)
    styles = [(text.plain[span.start : span.end], span.style) for span in text.spans]
    assert styles == [
        ("<|im_start|>", "dim reverse"),
        ("hi", "dim"),
        ("⏎\n", "dim"),
        ("yes", "green"),
        ("<|im_end|>", "green reverse"),
    ]


def test_preview_keeps_brackets_of_the_text(services: Any, run: Run) -> None:
    row = RenderedRow(
        row=3, filename="a.jsonl", line=7, tokens=[RenderedToken(text="[bold]x[/bold]", supervised=True)]
    )
    services.answers["PreviewRendering"] = lambda request, context: PreviewRenderingResponse(rows=[row])
    result = run("renderings", "preview", "r")
    assert "row 3    a.jsonl:7  1 tokens, 1 learnt" in result.stdout
    assert "[bold]x[/bold]" in result.stdout


@pytest.mark.parametrize(
    ("command", "method", "name", "stopped"),
    [
        ("datasets", "CancelDatasetVersion", VERSION, DatasetVersion),
        ("renderings", "CancelRendering", "projects/default/renderings/r1", Rendering),
        ("models", "CancelModel", "projects/default/models/r1", Model),
    ],
)
def test_cancel_asks_for_the_resource_and_shows_it(
    services: Any, run: Run, command: str, method: str, name: str, stopped: Any
) -> None:
    requests = []

    def cancel(request: Any, context: Any) -> Any:
        requests.append(request)
        return stopped(name=request.name, state=stopped.STATE_CANCELLING)

    services.answers[method] = cancel
    short = "mine/v1" if command == "datasets" else "r1"
    result = run(command, "cancel", short)
    assert result.exit_code == 0, result.stderr
    assert [request.name for request in requests] == [name]
    assert requests[0].request_id
    assert "CANCELLING" in result.stdout


def test_waiting_for_a_version_ends_with_6_when_it_was_cancelled(services: Any, run: Run, file: Path) -> None:
    DataFake(services, DatasetVersion(name=VERSION, state=DatasetVersion.STATE_CANCELLED))
    services.answers["ListDatasetVersionErrors"] = lambda request, context: ListDatasetVersionErrorsResponse()
    result = run("datasets", "create", str(file), "--name", "mine")
    assert result.exit_code == 6
    assert f"{VERSION} is CANCELLED: it was cancelled" in result.stderr
