"""`luthierd doctor` says what a machine can do and what is wrong with it, and changes nothing."""

from __future__ import annotations

import importlib.metadata
import json
import os
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from tests.daemon.test_luthierd import LUTHIERD, environment

from luthier.daemon import doctor
from luthier.errors import FailedPrecondition, InvalidArgument, Unavailable
from luthier.runtime.granted_keys import GRANTED_FILE, grant_key
from luthier.storage.disk import Disk


@contextmanager
def health_at(status: int, name: str = "luthier.v1.DataService") -> Iterator[str]:
    """A server that says how it is, and one service of it."""
    server = grpc.server(ThreadPoolExecutor(1))
    servicer = health.HealthServicer()
    servicer.set("", health_pb2.HealthCheckResponse.SERVING)
    servicer.set(name, status)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


def free_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return f"127.0.0.1:{free.getsockname()[1]}"


def test_a_port_is_free_serves_or_is_anothers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_ANSWER_SECONDS", 1.0)
    free = doctor.service("data", free_address())
    assert (free.level, "does not run" in free.text) == ("ok", True)
    with health_at(health_pb2.HealthCheckResponse.SERVING) as address:
        assert doctor.service("data", address).text == f"serves at {address}"
    with health_at(health_pb2.HealthCheckResponse.NOT_SERVING) as address:
        assert doctor.service("data", address).level == "warning"
    with socket.create_server(("127.0.0.1", 0)) as mute:
        found = doctor.service("data", f"127.0.0.1:{mute.getsockname()[1]}")
    assert found.level == "problem"
    assert "set LUTHIER_DATA_ADDRESS to another port" in found.text


def test_a_port_of_another_service_is_anothers() -> None:
    with health_at(health_pb2.HealthCheckResponse.SERVING, "luthier.v1.TrainingService") as address:
        assert doctor.service("training", address).level == "ok"
        assert doctor.service("data", address).level == "problem"


def test_a_proxy_of_the_environment_is_not_asked_for_a_service(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "grpc_proxy", "https_proxy"):
        monkeypatch.setenv(name, f"http://{free_address()}")
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setenv("no_grpc_proxy", "")
    with health_at(health_pb2.HealthCheckResponse.SERVING) as address:
        assert doctor.service("data", address).text == f"serves at {address}"


def test_a_home_is_no_folder_where_others_write(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    with pytest.raises(FailedPrecondition, match="mode 0777"):
        doctor.folder(shared)
    shared.chmod(0o700)
    assert doctor.folder(shared).level == "ok"
    later = doctor.folder(tmp_path / "not" / "yet")
    assert (later.level, str(tmp_path) in later.text) == ("ok", True)
    assert not (tmp_path / "not").exists()


def test_granted_keys_can_be_read_and_are_of_projects_that_are_served(tmp_path: Path) -> None:
    assert doctor.granted_keys(tmp_path, ("a",)).level == "ok"
    grant_key(tmp_path, "k", ["a", "gone"], ["reader"])
    found = doctor.granted_keys(tmp_path, ("a",))
    assert (found.level, "not served: gone;" in found.text) == ("warning", True)
    (tmp_path / GRANTED_FILE).rename(tmp_path / "real.toml")
    (tmp_path / GRANTED_FILE).symlink_to(tmp_path / "real.toml")
    findings = {one.what: one for one in doctor.examined(tmp_path, {})}
    assert findings["granted keys"].level == "problem"
    assert "symbolic link" in findings["granted keys"].text


def test_a_home_is_of_the_user_who_serves_and_may_be_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    refused: set[Path] = set()
    monkeypatch.setattr(os, "access", lambda path, mode: path not in refused or not mode & os.W_OK)
    refused.add(home)
    assert (doctor.folder(home).level, str(home) in doctor.folder(home).text) == ("problem", True)
    refused.add(tmp_path)
    found = doctor.folder(tmp_path / "not" / "yet")
    assert (found.level, f"may not write {tmp_path}:" in found.text) == ("problem", True)
    user = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    with pytest.raises(FailedPrecondition, match=f"belongs to user {user}, not to {user + 1}"):
        doctor.folder(home)
    (home / "file").touch()
    assert "must be a folder" in doctor.folder(home / "file").text


@pytest.mark.parametrize(
    ("state", "level", "word"),
    [(0, "ok", "kept"), (5, "warning", "chrony"), (-1, "warning", "cannot be asked")],
)
def test_a_clock_that_cannot_be_asked_is_not_kept_right(
    monkeypatch: pytest.MonkeyPatch, state: int, level: str, word: str
) -> None:
    monkeypatch.setattr(doctor, "_clock_state", lambda: state)
    found = doctor.clock()
    assert (found.level, word in found.text) == (level, True)


def test_settings_of_what_is_looked_at_are_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("versions", "processor", "kernels", "memory", "clock"):
        monkeypatch.setattr(doctor, name, lambda: doctor.Finding(what="x", level="ok", text=""))
    monkeypatch.setenv("LUTHIER_WORKER_DEVICE", "abacus")
    monkeypatch.setenv("LUTHIER_TRAINING_MIN_FREE_BYTES", str(1 << 60))
    with socket.create_server(("127.0.0.1", 0)) as mirror:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{mirror.getsockname()[1]}/hf")
        found = {one.what: one for one in doctor.examined(tmp_path, {})}
        assert (found["hub"].level, os.environ["HF_ENDPOINT"] in found["hub"].text) == ("ok", True)
    assert (found["device"].level, "got 'abacus'" in found["device"].text) == ("problem", True)
    assert (found["disk"].level, "the floor of" in found["disk"].text) == ("problem", True)


def test_traces_go_where_somebody_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LUTHIER_TRACES_ADDRESS", raising=False)
    assert (doctor.traces().level, "kept nowhere" in doctor.traces().text) == ("ok", True)
    monkeypatch.setenv("LUTHIER_TRACES_ADDRESS", free_address())
    found = doctor.traces()
    assert (found.level, "start a receiver" in found.text) == ("warning", True)
    with socket.create_server(("127.0.0.1", 0)) as receiver:
        address = f"127.0.0.1:{receiver.getsockname()[1]}"
        monkeypatch.setenv("LUTHIER_TRACES_ADDRESS", address)
        assert doctor.traces().text == f"are sent to {address}"


@pytest.mark.parametrize("setting", ["LUTHIER_TRACES_ADDRESS", "data"])
def test_an_address_that_is_none_is_a_problem(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, setting: str
) -> None:
    for name in ("versions", "processor", "kernels", "memory", "clock"):
        monkeypatch.setattr(doctor, name, lambda: doctor.Finding(what="x", level="ok", text=""))
    monkeypatch.setattr(doctor, "device", lambda _: doctor.Finding(what="x", level="ok", text=""))
    monkeypatch.setenv("HF_ENDPOINT", f"https://{free_address()}")
    nowhere = "127.0.0.1:99999"
    if setting != "data":
        monkeypatch.setenv(setting, nowhere)
    addresses = {"data": nowhere} if setting == "data" else {}
    problems = [one for one in doctor.examined(tmp_path, addresses) if one.level == "problem"]
    assert [one.what for one in problems] == ["data service" if setting == "data" else "traces"]
    assert f"got '{nowhere}'" in problems[0].text


@pytest.mark.parametrize(
    "endpoint", ["hf.example", "ftp://hf.example", "https://", "https://hf.example:much"]
)
def test_a_hub_that_is_no_address_is_named(endpoint: str) -> None:
    with pytest.raises(InvalidArgument, match=f"HF_ENDPOINT must be an address such as .*got '{endpoint}'"):
        doctor.hub(endpoint)


def test_room_is_compared_with_the_floor(tmp_path: Path) -> None:
    free = Disk(tmp_path).free_bytes()
    levels = [doctor.disk(tmp_path / "home", floor).level for floor in (2 * free, free // 2, 1)]
    assert levels == ["problem", "warning", "ok"]


def test_versions_must_agree_and_workers_need_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"luthier": "1", "luthier-client": "1", "grpcio": "2"}

    def version(name: str) -> str:
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert "pip install 'luthier[worker]'" in doctor.versions().text
    installed |= {"torch": "3", "transformers": "4", "torchao": "5"}
    assert doctor.versions().level == "ok"
    installed["luthier-client"] = "0"
    assert doctor.versions().level == "problem"


def test_what_cannot_be_looked_at_is_a_problem(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def gone(wanted: str) -> doctor.Finding:
        assert wanted == "auto"
        raise Unavailable("torch cannot be asked")

    for name in ("versions", "processor", "kernels", "memory", "clock"):
        monkeypatch.setattr(doctor, name, lambda: doctor.Finding(what="x", level="ok", text=""))
    monkeypatch.setattr(doctor, "device", gone)
    monkeypatch.setenv("HF_ENDPOINT", f"https://{free_address()}")
    found = {one.what: one for one in doctor.examined(tmp_path, {"data": free_address()})}
    assert (found["device"].level, found["device"].text) == ("problem", "torch cannot be asked")
    assert found["hub"].level == "warning"
    assert "from a folder or a GGUF file" in found["hub"].text


@pytest.mark.long
def test_the_command_ends_with_1_where_there_is_a_problem(tmp_path: Path) -> None:
    home = tmp_path / "home"
    settings = environment(home)
    well = subprocess.run(
        [LUTHIERD, "doctor", "--json"], env=settings, capture_output=True, text=True, check=False
    )
    found = {one["what"]: one for one in map(json.loads, well.stdout.splitlines())}
    assert {
        "versions",
        "processor",
        "kernels",
        "device",
        "memory",
        "home",
        "disk",
        "clock",
        "hub",
        "traces",
    } <= set(found)
    assert {"data service", "training service", "evaluation service"} <= set(found)
    assert [one for one in found.values() if one["level"] == "problem"] == [], well.stderr
    assert well.returncode == 0
    assert not home.exists(), "it changes nothing"
    home.mkdir()
    home.chmod(0o777)
    ill = subprocess.run([LUTHIERD, "doctor"], env=settings, capture_output=True, text=True, check=False)
    assert ill.returncode == 1
    (line,) = [line for line in ill.stdout.splitlines() if line.startswith("problem")]
    assert "set LUTHIER_HOME" in line
