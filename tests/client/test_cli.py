"""The `luthier` command against fake services: what it sends, what it writes where, how it ends."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from click.testing import CliRunner, Result

from luthier.client.cli import main
from luthier.v1.data_service_pb2 import (
    ListDatasetsResponse,
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
from luthier.v1.evaluation_pb2 import (
    FINISH_REASON_STOP,
    VERDICT_BETTER,
    ArmResult,
    Comparison,
    Evaluation,
    ScoreEstimate,
)
from luthier.v1.evaluation_service_pb2 import GenerateTextResponse, ListPredictionsResponse
from luthier.v1.event_pb2 import Event, MetricValues, Progress, StateChange
from luthier.v1.fine_tuning_job_pb2 import FineTuningJob, FineTuningPlan, MetricPoint
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


@pytest.fixture
def arguments(services: Any, home: Path) -> list[str]:
    flags = [f"--{service}-address={services.address}" for service in ("data", "training", "evaluation")]
    return [f"--home={home}", *flags]


@pytest.fixture
def run(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    for name in list(os.environ):
        if name.startswith("LUTHIER_"):
            monkeypatch.delenv(name)

    def invoke(*words: str, stdin: str | None = None) -> Result:
        return CliRunner().invoke(main, [*arguments, *words], input=stdin)

    return invoke


def _refusing(services: Any, code: grpc.StatusCode, **details: Any) -> Callable[..., None]:
    return lambda request, context: services.refuse(context, code, "it is so", **details)


@pytest.mark.parametrize(
    ("code", "exit_code"),
    [
        (grpc.StatusCode.NOT_FOUND, 3),
        (grpc.StatusCode.UNAUTHENTICATED, 4),
        (grpc.StatusCode.PERMISSION_DENIED, 4),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, 5),
        (grpc.StatusCode.INVALID_ARGUMENT, 1),
        (grpc.StatusCode.INTERNAL, 1),
    ],
)
def test_exit_code_tells_the_kind_of_error(
    services: Any, run: Run, code: grpc.StatusCode, exit_code: int
) -> None:
    services.answers["GetFineTuningJob"] = _refusing(services, code, reason="SOME_REASON")
    result = run("jobs", "show", "j")
    assert result.exit_code == exit_code
    assert result.stderr.splitlines()[0] == "error: it is so [SOME_REASON]"
    assert result.stdout == ""


def test_error_names_fields_and_request_id(services: Any, run: Run) -> None:
    services.answers["GetFineTuningJob"] = _refusing(
        services,
        grpc.StatusCode.INVALID_ARGUMENT,
        reason="INVALID_FIELD",
        metadata={"request_id": "r-7"},
        violations=(("lora.rank", "must be in 1..512, got 0"),),
    )
    lines = run("jobs", "show", "j").stderr.splitlines()
    assert lines[1:] == ["  lora.rank: must be in 1..512, got 0", "  request id r-7"]


def test_wrong_usage_ends_with_2_and_says_what_was_meant(run: Run) -> None:
    typo = run("datasest", "list")
    assert typo.exit_code == 2
    assert "Did you mean datasets?" in typo.stderr
    assert "Did you mean create?" in run("jobs", "creat").stderr
    assert run("jobs", "create").exit_code == 2
    assert run("evaluations", "create", "--version", "d/v", "--arm", "nonsense").exit_code == 2


def test_unreachable_service_ends_with_5_and_a_hint(
    arguments: list[str], services: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr("luthier.client.cli.session._PATIENCE_SECONDS", 0.3)
    services.stop()
    result = CliRunner().invoke(main, [*arguments, "jobs", "list"])
    assert result.exit_code == 5
    assert "luthierd up" in result.stderr


def test_missing_key_ends_with_4(arguments: list[str], tmp_path: Path) -> None:
    result = CliRunner().invoke(main, [*arguments, f"--home={tmp_path}", "jobs", "list"])
    assert result.exit_code == 4
    assert "CREDENTIALS_MISSING" in result.stderr


def test_list_writes_a_table_or_a_json_array_with_the_wire_names(services: Any, run: Run) -> None:
    dataset = Dataset(name="projects/default/datasets/mine", display_name="Mine", labels={"team": "a"})
    services.answers["ListDatasets"] = lambda request, context: ListDatasetsResponse(datasets=[dataset])
    table = run("datasets", "list").stdout.splitlines()
    assert table[0].split() == ["NAME", "DISPLAY", "NAME", "LABELS", "CREATED", "(UTC)"]
    assert table[1].split() == ["mine", "Mine", "team=a"]
    expected = [{"name": dataset.name, "display_name": "Mine", "labels": {"team": "a"}}]
    assert json.loads(run("--json", "datasets", "list").stdout) == expected
    assert json.loads(run("datasets", "list", "--json").stdout) == expected


def test_empty_list_says_so_on_stderr(services: Any, run: Run) -> None:
    services.answers["ListDatasets"] = lambda request, context: ListDatasetsResponse()
    result = run("datasets", "list")
    assert (result.stdout, result.stderr) == ("", "nothing found\n")
    assert json.loads(run("datasets", "list", "--json").stdout) == []


def test_project_option_completes_short_names(services: Any, run: Run) -> None:
    services.answers["GetModel"] = lambda request, context: Model(name=request.name)
    shown = run("--project", "other", "models", "show", "m", "--json")
    assert json.loads(shown.stdout)["name"] == "projects/other/models/m"


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
            progress=Progress(phase="training", completed=4, total=4, unit="steps", remaining_seconds=75),
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
        "j: training 4/4 steps  loss 1.25  tok/s 900  ETA 1:15",
        "j: SUCCEEDED",
    ]
    assert "\x1b" not in result.output


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


def test_evaluations_show_compares_the_arms(services: Any, run: Run) -> None:
    evaluation = Evaluation(
        name="projects/default/evaluations/e", state=Evaluation.STATE_SUCCEEDED, num_records=48
    )
    for arm, value in (("base-3", 0.25), ("tuned", 0.75)):
        estimate = ScoreEstimate(score="exact_match", value=value, lower=value - 0.1, upper=value + 0.1)
        evaluation.arm_results.append(ArmResult(arm_id=arm, scores=[estimate]))
    evaluation.comparisons.append(
        Comparison(
            candidate_arm_id="tuned",
            baseline_arm_id="base-3",
            score="exact_match",
            difference=0.5,
            lower=0.3,
            upper=0.7,
            p_value=0.001,
            count=48,
            verdict=VERDICT_BETTER,
        )
    )
    services.answers["GetEvaluation"] = lambda request, context: evaluation
    output = run("evaluations", "show", "e").stdout
    assert re.search(r"exact_match +25\.0 % \[15\.0, 35\.0\] +75\.0 % \[65\.0, 85\.0\]", output)
    assert re.search(r"tuned - base-3 +\+50\.0 pp \[\+30\.0, \+70\.0\] +0\.001 +48 +better", output)


def test_evaluations_create_reads_the_arms(services: Any, run: Run) -> None:
    seen: list[Evaluation] = []

    def create(request: Any, context: Any) -> Evaluation:
        seen.append(request.evaluation)
        return Evaluation(name="projects/default/evaluations/e")

    services.answers["CreateEvaluation"] = create
    arms = ("--arm", "base-3=m:3", "--arm", "tuned=projects/default/models/t")
    result = run("evaluations", "create", "--version", "mine/v1", *arms, "--metric", "field-match")
    assert result.exit_code == 0, result.output
    assert [(arm.arm_id, arm.model, arm.num_shots) for arm in seen[0].arms] == [
        ("base-3", "projects/default/models/m", 3),
        ("tuned", "projects/default/models/t", 0),
    ]
    assert (seen[0].dataset_version, list(seen[0].metrics), seen[0].split) == (VERSION, [2], SPLIT_TEST)


def test_evaluations_report_writes_the_file(services: Any, run: Run, tmp_path: Path) -> None:
    evaluation = Evaluation(name="projects/default/evaluations/e", state=Evaluation.STATE_SUCCEEDED)
    evaluation.arms.add(arm_id="tuned", model="projects/default/models/t")
    tuned = Model(name="projects/default/models/t", fine_tuning_job="projects/default/fineTuningJobs/j")
    job = FineTuningJob(name="projects/default/fineTuningJobs/j")
    points = [MetricPoint(step=step, values={"train_loss": 1.0 / step}) for step in (1, 2)]
    services.answers.update(
        GetEvaluation=lambda request, context: evaluation,
        ListPredictions=lambda request, context: ListPredictionsResponse(),
        GetModel=lambda request, context: tuned,
        GetFineTuningJob=lambda request, context: job,
        ReadFineTuningJobMetrics=lambda request, context: ReadFineTuningJobMetricsResponse(points=points),
    )
    output = tmp_path / "report.html"
    result = run("evaluations", "report", "e", "--output", str(output))
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{output}\n"
    assert 'class="train"' in output.read_text()


def _answering(services: Any) -> list[Any]:
    seen: list[Any] = []

    def generate(request: Any, context: Any) -> Iterator[GenerateTextResponse]:
        seen.append(request)
        yield GenerateTextResponse(text="two ")
        yield GenerateTextResponse(text="words", finish_reason=FINISH_REASON_STOP, num_generated_tokens=2)

    services.answers["GenerateText"] = generate
    return seen


def test_generate_streams_the_answer(services: Any, run: Run) -> None:
    seen = _answering(services)
    assert run("generate", "--model", "m", "--system", "Be brief.", "Say two words").stdout == "two words\n"
    assert [(turn.role, turn.content) for turn in seen[0].conversation.messages] == [
        ("system", "Be brief."),
        ("user", "Say two words"),
    ]
    assert run("generate", "--model", "m", "--raw", stdin="Once upon").stdout == "two words\n"
    assert seen[1].prompt == "Once upon"
    lines = run("generate", "--model", "m", "hello", "--json").stdout.splitlines()
    assert json.loads(lines[1]) == {
        "text": "words",
        "finish_reason": "FINISH_REASON_STOP",
        "num_generated_tokens": 2,
    }
    assert run("generate", "--model", "m", stdin="").exit_code == 2


def _command(*words: str) -> list[str]:
    return [sys.executable, "-c", "from luthier.client.cli import main; main()", *words]


def test_process_ends_with_the_exit_code_and_keeps_stdout_clean(services: Any, arguments: list[str]) -> None:
    services.answers["GetFineTuningJob"] = _refusing(
        services, grpc.StatusCode.NOT_FOUND, reason="RESOURCE_NOT_FOUND"
    )
    done = subprocess.run(
        _command(*arguments, "jobs", "show", "j"), capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr == "error: it is so [RESOURCE_NOT_FOUND]\n"


def test_interrupt_ends_with_130_and_tells_how_to_stop_the_job(
    services: Any, arguments: list[str], wait_until: Any
) -> None:
    ended: list[bool] = []

    def watch(request: Any, context: grpc.ServicerContext) -> Iterator[Event]:
        context.add_callback(lambda: ended.append(True))
        yield _job_events("RUNNING")[0]
        time.sleep(1)

    services.answers["WatchFineTuningJob"] = watch
    process = subprocess.Popen(
        _command(*arguments, "jobs", "watch", "j"), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    assert process.stderr.readline() == "j: RUNNING\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=10)
    assert process.returncode == 130
    assert errors.split("\n") == [
        "stopped watching; it goes on until: luthier jobs cancel j",
        "",
        "interrupted",
        "",
    ]
    wait_until(lambda: bool(ended))


def test_help_comes_quickly_and_loads_no_grpc() -> None:
    code = (
        "import sys, time; from luthier.client.cli import main; main(['--help'], standalone_mode=False);"
        "assert not {'grpc', 'rich', 'google.protobuf'} & set(sys.modules), 'loaded too much';"
        "print(time.process_time())"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        for _ in range(3)
    ]
    assert "Exit codes: 0 done" in runs[0].stdout
    # Processor time since the interpreter began: unlike wall time it does not depend on the neighbours.
    assert min(float(run.stdout.splitlines()[-1]) for run in runs) < 0.15


def test_every_command_has_a_help(run: Run) -> None:
    groups = ("datasets", "renderings", "models", "jobs", "evaluations")
    for group in groups:
        shown = run(group, "--help")
        assert shown.exit_code == 0
        commands = re.findall(r"^  ([a-z]+)  ", shown.stdout.split("Commands:")[1], re.MULTILINE)
        assert len(commands) >= 4
        for command in commands:
            assert run(group, command, "--help").exit_code == 0
