"""The `luthier` command as a whole: errors, exit codes, output for people and for programs, start-up."""

import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from click.testing import CliRunner, Result

from luthier.client.cli import main
from luthier.v1.data_service_pb2 import (
    ListDatasetsResponse,
    ListUploadsResponse,
)
from luthier.v1.dataset_pb2 import (
    Dataset,
)
from luthier.v1.event_pb2 import Event, StateChange
from luthier.v1.model_pb2 import Model
from luthier.v1.upload_pb2 import Upload

Run = Callable[..., Result]
VERSION = "projects/default/datasets/mine/versions/v1"


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


@pytest.mark.parametrize(
    ("skippable", "hint"),
    [("true", "`luthier datasets create --policy skip`"), ("false", "mend the file first")],
)
def test_error_of_records_hints_at_what_helps(services: Any, run: Run, skippable: str, hint: str) -> None:
    services.answers["GetFineTuningJob"] = _refusing(
        services,
        grpc.StatusCode.INVALID_ARGUMENT,
        reason="INVALID_RECORDS",
        metadata={"skippable": skippable},
    )
    (line,) = (line for line in run("jobs", "show", "j").stderr.splitlines() if line.startswith("hint:"))
    assert hint in line


def test_wrong_usage_ends_with_2_and_says_what_was_meant(run: Run) -> None:
    typo = run("datasest", "list")
    assert typo.exit_code == 2
    assert "Did you mean datasets or aliases?" in typo.stderr
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


def test_uploads_are_listed_by_state_and_shown(services: Any, run: Run) -> None:
    upload = Upload(
        name="projects/default/uploads/u1",
        state=Upload.STATE_RECEIVING,
        filename="a.jsonl",
        persisted_size_bytes=2048,
        size_bytes=4096,
    )
    asked = []

    def answer(request: Any, context: Any) -> ListUploadsResponse:
        asked.append(request.filter)
        return ListUploadsResponse(uploads=[upload])

    services.answers["ListUploads"] = answer
    services.answers["GetUpload"] = lambda request, context: upload
    lines = run("datasets", "uploads", "--state", "receiving").stdout.splitlines()
    assert lines[1].split() == ["u1", "RECEIVING", "a.jsonl", "2.0", "KiB", "4.0", "KiB"]
    run("datasets", "uploads")
    assert asked == ['state = "RECEIVING"', ""]
    shown = run("datasets", "uploads", "u1").stdout.splitlines()
    assert ["stored", "2.0", "KiB"] in [line.split() for line in shown]
    refused = run("datasets", "uploads", "u1", "--state", "complete")
    assert refused.exit_code == 2
    assert "leave out UPLOAD" in refused.stderr


def test_empty_list_says_so_on_stderr(services: Any, run: Run) -> None:
    services.answers["ListDatasets"] = lambda request, context: ListDatasetsResponse()
    result = run("datasets", "list")
    assert (result.stdout, result.stderr) == ("", "nothing found\n")
    assert json.loads(run("datasets", "list", "--json").stdout) == []


def test_project_option_completes_short_names(services: Any, run: Run) -> None:
    services.answers["GetModel"] = lambda request, context: Model(name=request.name)
    shown = run("--project", "other", "models", "show", "m", "--json")
    assert json.loads(shown.stdout)["name"] == "projects/other/models/m"


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


def test_interrupt_ends_with_130_and_tells_how_to_stop_the_job(services: Any, arguments: list[str]) -> None:
    ended = threading.Event()

    def watch(request: Any, context: grpc.ServicerContext) -> Iterator[Event]:
        context.add_callback(ended.set)
        yield Event(sequence=1, state_change=StateChange(state="RUNNING"))
        ended.wait(10)

    services.answers["WatchFineTuningJob"] = watch
    # Where a shell runs these tests in the background they ignore interrupts, and so would the command.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        _command(*arguments, "jobs", "watch", "j"), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    signal.signal(signal.SIGINT, before)
    with process:
        assert process.stderr is not None
        assert process.stderr.readline() == "j: RUNNING\n"
        process.send_signal(signal.SIGINT)
        try:
            _, errors = process.communicate(timeout=10)
        finally:
            process.kill()
    assert process.returncode == 130
    assert errors.split("\n") == [
        "stopped watching; it goes on until: luthier jobs cancel j",
        "",
        "interrupted",
        "",
    ]
    assert ended.wait(5)


def test_help_comes_quickly_and_loads_no_grpc() -> None:
    code = (
        "import sys, time; from luthier.client.cli import main; main(['--help'], standalone_mode=False);"
        "assert not {'grpc', 'rich', 'google.protobuf'} & set(sys.modules), 'loaded too much';"
        "print(time.process_time())"
    )
    bare = "import time; import click; print(time.process_time())"
    shown = {one: [_printed(one) for _ in range(4)] for one in (code, bare)}
    assert "Exit codes: 0 done" in shown[code][0]
    # Processor time since the interpreter began, against what a command line needs at least.
    seconds = {one: min(float(out.splitlines()[-1]) for out in outs) for one, outs in shown.items()}
    assert seconds[code] < 2.5 * seconds[bare]


def _printed(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_every_command_has_a_help(run: Run) -> None:
    groups = ("datasets", "renderings", "models", "jobs", "evaluations")
    for group in groups:
        shown = run(group, "--help")
        assert shown.exit_code == 0
        commands = re.findall(r"^  ([a-z]+)  ", shown.stdout.split("Commands:")[1], re.MULTILINE)
        assert len(commands) >= 4
        for command in commands:
            assert run(group, command, "--help").exit_code == 0
