"""The `luthierd` command from outside."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests import stores

LUTHIERD = str(Path(sys.executable).with_name("luthierd"))


def environment(home: Path, **settings: str) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("LUTHIER_")}
    found = {"LUTHIER_HOME": str(home)}
    for name in ("DATA", "TRAINING", "EVALUATION"):
        for kind in ("ADDRESS", "METRICS_ADDRESS"):
            with socket.create_server(("127.0.0.1", 0)) as free:
                found[f"LUTHIER_{name}_{kind}"] = f"127.0.0.1:{free.getsockname()[1]}"
    return clean | found | stores.environment(home) | settings


def up(settings: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen([LUTHIERD, "up", "--no-workers"], env=settings, stderr=subprocess.PIPE, text=True)


def await_ready(process: subprocess.Popen[str]) -> str:
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("ready in"):
            return line
    pytest.fail("luthierd ended before it was ready")


@dataclass(frozen=True, slots=True, kw_only=True)
class Life:
    """One `luthierd up` from its start to its end, on a home that others may read."""

    home: Path
    pid: int
    first_line: str
    second: subprocess.CompletedProcess[str]
    returncode: int
    stop_seconds: float


@pytest.fixture(scope="module")
def life(tmp_path_factory: pytest.TempPathFactory) -> Life:
    home = tmp_path_factory.mktemp("luthierd") / "home"
    home.mkdir()
    home.chmod(0o755)
    settings = environment(home)
    process = subprocess.Popen(
        [LUTHIERD, "up", "--no-workers"], env=settings, stderr=subprocess.PIPE, text=True, umask=0
    )
    assert process.stderr is not None
    first_line = process.stderr.readline()
    await_ready(process)
    second = subprocess.run(
        [LUTHIERD, "up"], env=settings, capture_output=True, text=True, timeout=30, check=False
    )
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    return Life(
        home=home,
        pid=process.pid,
        first_line=first_line,
        second=second,
        returncode=process.returncode,
        stop_seconds=time.monotonic() - began,
    )


@pytest.mark.e2e
def test_up_serves_refuses_a_second_one_and_stops(life: Life) -> None:
    assert life.second.returncode == 1
    assert f"luthierd (pid {life.pid}) runs on {life.home} already" in life.second.stderr
    assert life.returncode == 0
    assert life.stop_seconds < 5


@pytest.mark.e2e
def test_up_on_a_home_that_others_may_read_takes_it_back_whatever_the_umask(life: Life) -> None:
    assert life.first_line == f"warning: {life.home} had mode 0755, others could get at it: now 0700\n"
    databases = [stores.service_file(life.home, service) for service in stores.SERVICES]
    paths = [life.home, *life.home.rglob("*"), *databases]
    assert {path.name for path in paths} > {"api-key", "data.log"}
    assert [path for path in paths if path.stat().st_mode & 0o077] == []


@pytest.mark.e2e
def test_up_with_a_taken_port_fails_and_leaves_nothing_running(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        settings = environment(tmp_path / "home", LUTHIER_DATA_ADDRESS=address)
        process = up(settings)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "data ended at start-up" in said
    assert f"cannot serve on {address}" in said


def test_an_unknown_setting_is_refused(tmp_path: Path) -> None:
    settings = environment(tmp_path / "home", LUTHIER_HOEM="/x")
    process = up(settings)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "did you mean LUTHIER_HOME?" in said
