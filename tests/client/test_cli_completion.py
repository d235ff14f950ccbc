"""Completion by real shells: words, options and names of resources, which the services are asked for."""

from __future__ import annotations

import os
import pty
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from luthier.client.cli import main
from luthier.client.cli.completion import installed
from luthier.v1.data_service_pb2 import ListDatasetsResponse, ListDatasetVersionsResponse
from luthier.v1.dataset_pb2 import Dataset, DatasetVersion
from luthier.v1.fine_tuning_job_pb2 import FineTuningJob
from luthier.v1.model_pb2 import Model
from luthier.v1.model_service_pb2 import ListModelsResponse
from luthier.v1.training_service_pb2 import ListFineTuningJobsResponse

BIN = Path(sys.executable).parent
ALL_AT_ONCE = """
PS1='ready> '
all-at-once() { compstate[insert]=all; compstate[list]= }
comppostfuncs=(all-at-once)
say-line() { print -r -- "$BUFFER" > ~/said && mv ~/said ~/line }
zle -N say-line
bindkey '^G' say-line
"""
"""Has zsh put all that it would list into the line, and write the line down at Ctrl-G."""


@pytest.fixture
def environment(services: Any, home: Path, tmp_path: Path) -> dict[str, str]:
    """What a user's shell has, with completion installed by the one command."""
    services.answers |= {
        "ListFineTuningJobs": lambda request, context: ListFineTuningJobsResponse(
            fine_tuning_jobs=[
                FineTuningJob(name=f"projects/default/fineTuningJobs/{name}")
                for name in ("support-1", "support-2", "other")
            ]
        ),
        "ListModels": lambda request, context: ListModelsResponse(
            models=[Model(name="projects/default/models/smollm2")]
        ),
        "ListDatasets": lambda request, context: ListDatasetsResponse(
            datasets=[Dataset(name="projects/default/datasets/mails")]
        ),
        "ListDatasetVersions": lambda request, context: ListDatasetVersionsResponse(
            dataset_versions=[
                DatasetVersion(name=f"{request.parent}/versions/v{number}") for number in (1, 2)
            ]
        ),
    }
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("LUTHIER_", "XDG_"))}
    user = tmp_path / "user"
    user.mkdir()
    return clean | {
        "HOME": str(user),
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "SHELL": "/bin/bash",
        "LUTHIER_HOME": str(home),
        **{f"LUTHIER_{name}_ADDRESS": services.address for name in ("DATA", "TRAINING", "EVALUATION")},
    }


def completed(environment: dict[str, str], *words: str) -> list[str]:
    """What bash offers for the last word, in a shell that has read the user's start-up file."""
    typed = " ".join(f"'{word}'" for word in words)
    script = (
        f". ~/.bashrc; COMP_WORDS=({typed}); COMP_CWORD={len(words) - 1}; "
        'function=$(complete -p luthier | sed "s/.*-F \\([^ ]*\\).*/\\1/"); '
        '$function luthier; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
        ["bash", "--norc", "-c", script],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.split()


def completed_by_fish(environment: dict[str, str], *words: str) -> list[str]:
    """What fish offers for the last word, by the file that it finds for the command."""
    command = ["fish", "-c", "complete -C $argv[1]", " ".join(words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return [line.split("\t")[0] for line in done.stdout.splitlines()]


def completed_by_zsh(environment: dict[str, str], *words: str) -> list[str]:
    """What zsh puts into the line for the last word, typed into a terminal with a tab after it."""
    user = Path(environment["HOME"])
    (said := user / "line").unlink(missing_ok=True)
    zshrc = (user / ".zshrc").read_text()
    if ALL_AT_ONCE not in zshrc:
        (user / ".zshrc").write_text(zshrc + ALL_AT_ONCE)
    ours, theirs = pty.openpty()
    shown = bytearray()
    with subprocess.Popen(
        ["zsh", "-i"],
        env=environment | {"TERM": "dumb"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    ) as zsh:
        os.close(theirs)
        reading = threading.Thread(target=read_all, args=(ours, shown))
        reading.start()
        try:
            until(lambda: b"ready> " in shown, shown)
            os.write(ours, " ".join(words).encode() + b"\t\x07")
            until(said.exists, shown)
        finally:
            zsh.kill()
    reading.join()
    os.close(ours)
    return [word for word in said.read_text().split()[len(words) - 1 :] if word]


def read_all(terminal: int, into: bytearray) -> None:
    """Read what is written to a terminal, until nobody has it open any more."""
    while True:
        try:
            into += os.read(terminal, 4096)
        except OSError:
            return


def until(is_so: Callable[[], bool], shown: bytearray) -> None:
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline, shown.decode(errors="replace")
        time.sleep(0.02)


SHELLS = {"bash": completed, "zsh": completed_by_zsh, "fish": completed_by_fish}


@pytest.fixture(params=SHELLS)
def shell(request: pytest.FixtureRequest) -> str:
    if shutil.which(request.param) is None:
        pytest.fail(
            f"{request.param} is missing: bash tests/debian.sh installs what the tests need of Debian"
        )
    return str(request.param)


def install(environment: dict[str, str], *words: str) -> str:
    command = [str(BIN / "luthier"), "completion", "install", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_shell_completes_words_options_and_names(environment: dict[str, str], shell: str) -> None:
    offered = SHELLS[shell]
    said = install(environment | {"SHELL": f"/usr/bin/{shell}"})
    assert f"{'luthier' if shell == 'fish' else 'completion'}.{shell} is written" in said
    assert "jobs" in offered(environment, "luthier", "j")
    assert "cancel" in offered(environment, "luthier", "jobs", "ca")
    assert "--notify" in offered(environment, "luthier", "jobs", "create", "--no")
    assert offered(environment, "luthier", "jobs", "show", "sup") == ["support-1", "support-2"]
    assert offered(environment, "luthier", "jobs", "delete", "o") == ["other"]
    assert offered(environment, "luthier", "jobs", "create", "--model", "") == ["smollm2"]
    assert offered(environment, "luthier", "generate", "--model", "sm") == ["smollm2"]
    assert offered(environment, "luthier", "datasets", "show", "ma") == ["mails"]
    assert offered(environment, "luthier", "datasets", "show", "mails/") == ["mails/v1", "mails/v2"]
    assert "yaml" in offered(environment, "luthier", "jobs", "list", "-o", "y")


def test_installing_twice_changes_nothing(environment: dict[str, str]) -> None:
    start = Path(environment["HOME"]) / ".bashrc"
    start.write_text("alias ll='ls -l'")
    install(environment)
    first = start.read_text()
    assert first.splitlines()[0] == "alias ll='ls -l'"
    install(environment)
    assert start.read_text() == first


def test_profiles_are_completed(environment: dict[str, str], tmp_path: Path) -> None:
    install(environment)
    (file := tmp_path / "profiles.toml").write_text("[profiles.laptop]\n[profiles.team]\n")
    more = environment | {"LUTHIER_CLIENT_CONFIG": str(file)}
    assert completed(more, "luthier", "--profile", "") == ["laptop", "team"]


def test_services_that_are_away_give_no_names_and_no_noise(environment: dict[str, str], shell: str) -> None:
    install(environment, shell)
    away = environment | {"LUTHIER_TRAINING_ADDRESS": "127.0.0.1:1"}
    began = time.monotonic()
    assert SHELLS[shell](away, "luthier", "jobs", "show", "") == []
    assert time.monotonic() - began < 20


def test_each_shell_has_its_script_and_its_place(tmp_path: Path) -> None:
    for shell, place in (
        ("bash", ".local/share/luthier/completion.bash"),
        ("zsh", ".local/share/luthier/completion.zsh"),
        ("fish", ".config/fish/completions/luthier.fish"),
    ):
        shown = CliRunner().invoke(main, ["completion", "show", shell])
        assert shown.exit_code == 0, shown.output
        assert "_LUTHIER_COMPLETE" in shown.stdout
        installed(shell, shown.stdout, tmp_path, {})
        assert (tmp_path / place).read_text().strip() == shown.stdout.strip()
    assert "compinit" in (tmp_path / ".zshrc").read_text()
    assert "completion.zsh" in (tmp_path / ".zshrc").read_text()
    assert not (tmp_path / ".config" / "fish" / "config.fish").exists()


def test_a_shell_that_is_none_of_ours_must_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHELL", "/bin/dash")
    result = CliRunner().invoke(main, ["completion", "install"])
    assert result.exit_code == 2
    assert "name the shell, one of bash, zsh, fish: SHELL is dash" in result.stderr
