"""`luthier doctor` looks at all that leads to the services, a line each, and ends with 1 where something is wrong."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from click.testing import CliRunner, Result
from tests.client.conftest import API_KEY

from luthier.client.cli import main
from luthier.client.config import ConfigArguments
from luthier.client.doctor import Finding, examined
from luthier.v1.data_service_pb2 import ListDatasetsResponse
from luthier.v1.evaluation_service_pb2 import ListEvaluationsResponse
from luthier.v1.training_service_pb2 import ListFineTuningJobsResponse

Run = Callable[..., Result]
SERVICES = ("data service", "training service", "evaluation service")


def answering(services: Any, *, key: str = API_KEY, told: str = "", ahead_seconds: float = 0.0) -> None:
    """Have all three answer as services do: who they are, and nothing to a wrong key."""

    def answer(response: Any) -> Any:
        def handle(request: Any, context: grpc.ServicerContext) -> Any:
            del request
            trailers = [("x-request-id", "r")]
            metadata = dict(context.invocation_metadata())
            if metadata.get("authorization") != f"Bearer {key}":
                context.set_trailing_metadata(tuple(trailers))
                context.abort(grpc.StatusCode.UNAUTHENTICATED, "the API key is not known here")
            if "luthier-about" in metadata and told:
                trailers += [("luthier-version", told), ("luthier-time", f"{time.time() + ahead_seconds}")]
            context.set_trailing_metadata(tuple(trailers))
            return response

        return handle

    services.answers |= {
        "ListDatasets": answer(ListDatasetsResponse()),
        "ListFineTuningJobs": answer(ListFineTuningJobsResponse()),
        "ListEvaluations": answer(ListEvaluationsResponse()),
    }


def found(result: Result) -> dict[str, dict[str, str]]:
    return {one["what"]: one for one in json.loads(result.stdout)}


def test_all_is_well(services: Any, run: Run, home: Path) -> None:
    answering(services, told=version("luthier-client"))
    (home / "api-key").chmod(0o600)
    result = run("doctor")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["ok"] * 8
    assert f"found in {home / 'api-key'}" in result.stdout
    assert f"{services.address} answers, and takes the key" in result.stdout
    assert API_KEY not in result.output
    assert services.calls["ListDatasets"] == services.calls["ListEvaluations"] == 1


def test_the_forms_for_programs_say_the_same(services: Any, run: Run) -> None:
    answering(services, told="0")
    as_json, as_yaml = run("doctor", "-o", "json"), run("doctor", "-o", "yaml")
    assert [one["what"] for one in json.loads(as_json.stdout)] == [
        "configuration",
        "profile",
        "key",
        *SERVICES,
        "versions",
        "clock",
    ]
    assert yaml.safe_load(as_yaml.stdout) == json.loads(as_json.stdout)
    assert run("doctor", "-o", "name").exit_code == 2


def test_a_wrong_key_is_a_problem_of_each_service_that_refuses_it(
    services: Any, run: Run, home: Path
) -> None:
    answering(services, key="another")
    result = run("--json", "doctor")
    assert result.exit_code == 1
    shown = found(result)
    for name in SERVICES:
        assert shown[name]["level"] == "problem"
        assert (
            f"does not take the key of {home / 'api-key'}: the API key is not known here"
            in shown[name]["text"]
        )
    assert shown["key"]["level"] in ("ok", "warning"), "it is there"
    assert API_KEY not in result.output


def test_without_a_key_services_are_still_looked_for(services: Any, run: Run, home: Path) -> None:
    answering(services)
    (home / "api-key").unlink()
    result = run("--json", "doctor")
    assert result.exit_code == 1
    shown = found(result)
    assert (shown["key"]["level"], str(home / "api-key") in shown["key"]["text"]) == ("problem", True)
    assert {shown[name]["level"] for name in SERVICES} == {"warning"}
    assert "authorization" not in services.metadata["ListDatasets"]


def test_a_key_that_others_may_read_is_a_warning(services: Any, run: Run, home: Path) -> None:
    answering(services)
    (home / "api-key").chmod(0o644)
    result = run("--json", "doctor")
    assert result.exit_code == 0
    assert "chmod 600" in found(result)["key"]["text"]


def test_a_service_that_is_down_is_named_with_its_setting(services: Any, run: Run) -> None:
    answering(services)
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    result = run("--json", "--training-address", address, "doctor")
    assert result.exit_code == 1
    shown = found(result)
    assert shown["data service"]["level"] == shown["evaluation service"]["level"] == "ok"
    down = shown["training service"]
    assert down["level"] == "problem"
    assert f"nobody answers at {address}" in down["text"]
    assert "--training-address, LUTHIER_TRAINING_ADDRESS or the profile" in down["text"]


def test_a_stranger_at_an_address_is_told_from_a_service(services: Any, run: Run) -> None:
    answering(services)
    del services.answers["ListEvaluations"]  # what is unimplemented there has no request id either
    shown = found(run("--json", "doctor"))
    assert shown["evaluation service"]["level"] == "problem"
    assert (
        f"something else answers at {services.address} (UNIMPLEMENTED)" in shown["evaluation service"]["text"]
    )


@pytest.mark.parametrize(
    ("code", "level"),
    [
        (grpc.StatusCode.PERMISSION_DENIED, "warning"),
        (grpc.StatusCode.NOT_FOUND, "problem"),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "warning"),
    ],
)
def test_what_a_service_refuses_is_said_in_its_words(
    services: Any, run: Run, code: grpc.StatusCode, level: str
) -> None:
    answering(services)

    def refuse(_: Any, context: grpc.ServicerContext) -> None:
        context.set_trailing_metadata((("x-request-id", "r"),))
        context.abort(code, "it is so\x1b[2J")

    services.answers["ListDatasets"] = refuse
    result = run("doctor")
    assert result.exit_code == (1 if level == "problem" else 0)
    (line,) = [line for line in result.stdout.splitlines() if "data service" in line]
    assert line.startswith(level)
    assert "it is so" in line
    assert "\x1b" not in line


def test_an_address_that_is_none_is_a_problem_of_its_service_alone(services: Any, run: Run) -> None:
    answering(services)
    shown = found(run("--json", "--data-address", "example.com:7601", "doctor"))
    assert (shown["data service"]["level"], shown["training service"]["level"]) == ("problem", "ok")
    assert "got 'example.com:7601'" in shown["data service"]["text"]


def test_versions_that_differ_are_told(services: Any, run: Run) -> None:
    answering(services, told="9.9.9")
    shown = found(run("--json", "doctor"))["versions"]
    assert shown["level"] == "warning"
    assert f"luthier-client {version('luthier-client')}" in shown["text"]
    assert "data 9.9.9, training 9.9.9, evaluation 9.9.9" in shown["text"]


@pytest.mark.parametrize(
    ("ahead", "words"), [(3600.0, "behind the services'"), (-3600.0, "ahead of the services'")]
)
def test_a_clock_that_is_off_is_told(services: Any, run: Run, ahead: float, words: str) -> None:
    answering(services, told="1", ahead_seconds=ahead)
    shown = found(run("--json", "doctor"))["clock"]
    assert shown["level"] == "warning"
    assert words in shown["text"]
    assert "3600.0 s" in shown["text"] or "3599.9 s" in shown["text"]


def test_a_service_that_tells_no_time_leaves_the_clock_unknown(services: Any, run: Run) -> None:
    answering(services)
    shown = found(run("--json", "doctor"))
    assert (shown["clock"]["level"], shown["versions"]["level"]) == ("warning", "ok")
    assert "no service told its own" in shown["versions"]["text"]


def test_a_profile_says_where_and_by_whom_it_is_named(services: Any, home: Path, tmp_path: Path) -> None:
    answering(services)
    file = tmp_path / "luthier" / "config.toml"
    file.parent.mkdir()
    addresses = "\n".join(
        f'{name}_address = "{services.address}"' for name in ("data", "training", "evaluation")
    )
    file.write_text(
        f'default_profile = "here"\n[profiles.here]\nproject = "p"\nhome = "{home}"\n{addresses}\n'
    )
    environ = {"XDG_CONFIG_HOME": str(tmp_path)}
    shown = {one.what: one for one in examined(ConfigArguments(), environ)}
    assert shown["configuration"].text == f"{file} has the profiles here"
    assert shown["profile"].text == "here, named by default_profile; the project is p"
    assert {shown[name].level for name in SERVICES} == {"ok"}
    named = {one.what: one for one in examined(ConfigArguments(profile="here"), environ)}
    assert "named by --profile" in named["profile"].text
    (absent,) = [one for one in examined(ConfigArguments(profile="there"), environ) if one.level == "problem"]
    assert (absent.what, "there are: here" in absent.text) == ("profile", True)


def problems(environ: dict[str, str]) -> list[Finding]:
    return [one for one in examined(ConfigArguments(), environ) if one.level == "problem"]


def test_a_configuration_that_is_wrong_is_the_last_that_is_looked_at(tmp_path: Path) -> None:
    (file := tmp_path / "config.toml").write_text("[profiles.a]\nprojekt = 1\n")
    (wrong,) = problems({"LUTHIER_CLIENT_CONFIG": str(file)})
    assert (wrong.what, "did you mean project?" in wrong.text) == ("configuration", True)
    (missing,) = problems({"LUTHIER_CLIENT_CONFIG": str(tmp_path / "none.toml")})
    assert "must name a file" in missing.text
    (unknown,) = problems({"XDG_CONFIG_HOME": str(tmp_path), "LUTHIER_CLIENT_PROJEKT": "p"})
    assert "LUTHIER_CLIENT_PROJEKT is not known" in unknown.text


def test_the_command_ends_with_1_for_a_profile_that_there_is_not(run: Run) -> None:
    result = run("--profile", "no-such", "doctor")
    assert result.exit_code == 1
    assert result.stdout.splitlines()[-1].startswith("problem")


def test_a_typo_finds_it() -> None:
    result = CliRunner().invoke(main, ["docter"])
    assert (result.exit_code, "Did you mean doctor?" in result.stderr) == (2, True)
