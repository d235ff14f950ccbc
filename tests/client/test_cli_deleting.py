"""Deleting from the command line: what is meant, asked where somebody can answer."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from click.testing import Result

from luthier.v1.dataset_pb2 import Dataset, DatasetVersion
from luthier.v1.evaluation_pb2 import Evaluation
from luthier.v1.fine_tuning_job_pb2 import FineTuningJob
from luthier.v1.model_alias_pb2 import ModelAlias
from luthier.v1.model_pb2 import Model
from luthier.v1.model_service_pb2 import ListModelsResponse
from luthier.v1.rendering_pb2 import Rendering

Run = Callable[..., Result]
VERSION = "projects/default/datasets/mine/versions/v1"
JOB = "projects/default/fineTuningJobs/j"


@pytest.mark.parametrize(
    ("command", "short", "method", "name", "kind"),
    [
        ("datasets", "mine", "DeleteDataset", "projects/default/datasets/mine", Dataset),
        ("datasets", "mine/v1", "DeleteDatasetVersion", VERSION, DatasetVersion),
        ("renderings", "r1", "DeleteRendering", "projects/default/renderings/r1", Rendering),
        ("models", "m", "DeleteModel", "projects/default/models/m", Model),
        ("jobs", "j", "DeleteFineTuningJob", "projects/default/fineTuningJobs/j", FineTuningJob),
        ("evaluations", "e", "DeleteEvaluation", "projects/default/evaluations/e", Evaluation),
        ("aliases", "a", "DeleteModelAlias", "projects/default/modelAliases/a", ModelAlias),
    ],
)
def test_delete_asks_for_the_resource_and_says_that_it_is_gone(
    services: Any, run: Run, command: str, short: str, method: str, name: str, kind: Any
) -> None:
    requests = []

    def delete(request: Any, context: Any) -> Any:
        requests.append(request)
        return kind(name=request.name, uid="u")

    services.answers[method] = delete
    result = run(command, "delete", short)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"{name} is deleted\n"
    assert [(request.name, request.etag) for request in requests] == [(name, "")]
    assert requests[0].request_id, "made again after a break it is answered as before"
    assert json.loads(run("--json", command, "delete", short).stdout)["uid"] == "u"
    assert run(command, "delete", short, "--etag", '"3"').exit_code == 0
    assert run(command, "delete", short, "--etag=3", "--yes").exit_code == 0
    assert [request.etag for request in requests[2:]] == ['"3"', '"3"'], "a shell takes the quotes away"


@pytest.mark.parametrize(
    ("command", "short", "kind", "name", "message"),
    [
        ("datasets", "mine", "Dataset", "projects/default/datasets/mine", Dataset),
        ("datasets", "mine/v1", "DatasetVersion", VERSION, DatasetVersion),
        ("renderings", "r1", "Rendering", "projects/default/renderings/r1", Rendering),
        ("models", "m", "Model", "projects/default/models/m", Model),
        ("jobs", "j", "FineTuningJob", "projects/default/fineTuningJobs/j", FineTuningJob),
        ("evaluations", "e", "Evaluation", "projects/default/evaluations/e", Evaluation),
    ],
)
def test_undelete_and_purge_ask_for_the_resource_and_say_what_became_of_it(
    services: Any, run: Run, command: str, short: str, kind: str, name: str, message: Any
) -> None:
    requests = []

    def answer(request: Any, context: Any) -> Any:
        requests.append(request)
        return message(name=request.name, uid="u")

    services.answers |= {f"Undelete{kind}": answer, f"Purge{kind}": answer}
    assert run(command, "undelete", short).stdout == f"{name} is back\n"
    assert run(command, "purge", short, "--uid", "u7").stdout == f"{name} is purged\n"
    services.answers[f"Delete{kind}"] = answer
    assert run(command, "delete", short, "--now", "--etag=3").stdout == f"{name} is purged\n"
    assert [(type(one).__name__, one.name, getattr(one, "uid", "")) for one in requests] == [
        (f"Undelete{kind}Request", name, ""),
        (f"Purge{kind}Request", name, "u7"),
        (f"Delete{kind}Request", name, ""),
        (f"Purge{kind}Request", name, "u"),
    ]
    assert [one.etag for one in requests] == ["", "", '"3"', ""]
    assert all(one.request_id for one in requests)


def test_list_shows_until_when_what_is_deleted_comes_back(services: Any, run: Run) -> None:
    asked = []
    gone = Model(name="projects/default/models/old", state=Model.STATE_READY)
    gone.delete_time.FromSeconds(1_700_000_000)
    gone.purge_time.FromSeconds(1_702_592_000)

    def models(request: Any, context: Any) -> ListModelsResponse:
        asked.append(request.show_deleted)
        return ListModelsResponse(models=[gone] if request.show_deleted else [])

    services.answers["ListModels"] = models
    assert "nothing found" in run("models", "list").stderr
    assert "DELETED until" in run("models", "list", "--deleted").stdout
    assert (
        json.loads(run("--json", "models", "list", "--deleted").stdout)[0]["purge_time"]
        == "2023-12-14T22:13:20Z"
    )
    assert asked == [False, True, True]


def at_a_terminal(arguments: list[str], *words: str, answer: str) -> tuple[int, str, str]:
    """Run a command as at a terminal, and answer it; returns its code, its stdout and what the terminal showed."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", "from luthier.client.cli import main; main()", *arguments, *words]
    with subprocess.Popen(command, stdin=theirs, stdout=subprocess.PIPE, stderr=theirs) as process:
        os.close(theirs)
        os.write(ours, answer.encode())
        assert process.stdout is not None
        out = process.stdout.read().decode()
        code = process.wait(timeout=60)
    shown = b""
    try:
        while piece := os.read(ours, 4096):
            shown += piece
    except OSError:  # Linux ends a terminal that nobody holds so
        pass
    os.close(ours)
    return code, out, shown.decode()


def test_delete_asks_whoever_sits_at_the_terminal(services: Any, arguments: list[str]) -> None:
    services.answers["DeleteFineTuningJob"] = lambda request, context: FineTuningJob(name=request.name)
    code, out, shown = at_a_terminal(arguments, "jobs", "delete", "j", answer="n\n")
    assert (code, out) == (1, "")
    assert "delete j? [y/N]: " in shown
    assert "nothing was deleted" in shown
    assert services.calls["DeleteFineTuningJob"] == 0
    code, out, _ = at_a_terminal(arguments, "jobs", "delete", "j", answer="y\n")
    assert (code, out) == (0, f"{JOB} is deleted\n")
    code, out, shown = at_a_terminal(arguments, "jobs", "delete", "j", "--yes", answer="")
    assert (code, out) == (0, f"{JOB} is deleted\n")
    assert "delete j?" not in shown
    assert services.calls["DeleteFineTuningJob"] == 2
