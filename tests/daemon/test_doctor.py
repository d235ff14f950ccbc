"""`luthierd doctor` says what a machine can do and what is wrong with it, and changes nothing."""

from __future__ import annotations

import importlib.metadata
import json
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
from luthier.errors import Unavailable
from luthier.storage.disk import Disk


@contextmanager
def health_at(status: int) -> Iterator[str]:
    """A service that says how it is."""
    server = grpc.server(ThreadPoolExecutor(1))
    servicer = health.HealthServicer()
    servicer.set("", status)
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


def test_a_home_is_no_folder_where_others_write(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    found = doctor.folder(shared)
    assert (found.level, "mode 0777" in found.text) == ("problem", True)
    shared.chmod(0o700)
    assert doctor.folder(shared).level == "ok"
    later = doctor.folder(tmp_path / "not" / "yet")
    assert (later.level, str(tmp_path) in later.text) == ("ok", True)
    assert not (tmp_path / "not").exists()


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
    def gone() -> doctor.Finding:
        raise Unavailable("torch cannot be asked")

    for name in ("versions", "processor", "kernels", "memory", "clock"):
        monkeypatch.setattr(doctor, name, lambda: doctor.Finding(what="x", level="ok", text=""))
    monkeypatch.setattr(doctor, "device", gone)
    monkeypatch.setattr(doctor, "_HUB", ("127.0.0.1", int(free_address().rpartition(":")[2])))
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
    assert {"versions", "processor", "kernels", "device", "memory", "home", "disk", "clock", "hub"} <= set(
        found
    )
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
