"""`luthierd doctor` says what a machine can do and what is wrong with it, and changes nothing."""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import os
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from tests.daemon.test_luthierd import LUTHIERD, environment

from luthier.daemon import doctor
from luthier.errors import FailedPrecondition, InvalidArgument, Unavailable
from luthier.kernels.tables import OPS
from luthier.runtime.config import read
from luthier.runtime.granted_keys import GRANTED_FILE, grant_key
from luthier.runtime.metrics import MetricsServer
from luthier.storage.disk import Disk
from luthier.work.worker_config import WorkerConfig


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


def pages(**addresses: str) -> dict[str, str]:
    """Every address that services listen at, by its setting: those given, and of the others free ones."""
    settings = [f"{name}{kind}" for name in ("DATA", "TRAINING", "EVALUATION") for kind in ("", "_METRICS")]
    taken = {f"LUTHIER_{name}_ADDRESS": free_address() for name in settings}
    return taken | {f"LUTHIER_{name}_ADDRESS": address for name, address in addresses.items()}


def test_an_address_of_metrics_that_something_else_has_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_ANSWER_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        address = f"127.0.0.1:{mute.getsockname()[1]}"
        found = doctor.metrics("data", pages(DATA_METRICS=address))
    assert (found.what, found.level) == ("data metrics", "problem")
    assert f"{address} cannot be taken" in found.text
    assert "set LUTHIER_DATA_METRICS_ADDRESS to another" in found.text
    assert doctor.metrics("training", pages()).level == "ok"
    elsewhere = doctor.metrics("data", pages(DATA_METRICS="192.0.2.1:9601"))
    assert (elsewhere.level, "it must be this machine's" in elsewhere.text) == ("problem", True)


async def test_metrics_that_are_served_already_are_well() -> None:
    async with MetricsServer("127.0.0.1:0").serving() as port:
        taken = pages(EVALUATION_METRICS=f"127.0.0.1:{port}")
        found = await asyncio.to_thread(doctor.metrics, "evaluation", taken)
    assert (found.level, found.text) == ("ok", f"are served at 127.0.0.1:{port}")


def test_two_settings_of_one_address_are_named() -> None:
    address = free_address()
    found = doctor.metrics("training", pages(TRAINING_METRICS=address, DATA=address))
    assert (found.level, "LUTHIER_DATA_ADDRESS are both" in found.text) == ("problem", True)
    assert (
        doctor.metrics("training", pages(TRAINING_METRICS="127.0.0.1:0", DATA_METRICS="127.0.0.1:0")).level
        == "ok"
    )
    nowhere = doctor.metrics("training", pages(TRAINING_METRICS="127.0.0.1:http"))
    assert (nowhere.level, "got '127.0.0.1:http'" in nowhere.text) == ("problem", True)


def test_each_service_has_its_metrics_looked_at(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("versions", "processor", "kernels", "memory", "clock"):
        monkeypatch.setattr(doctor, name, lambda: doctor.Finding(what="x", level="ok", text=""))
    monkeypatch.setenv("HF_ENDPOINT", f"https://{free_address()}")
    with socket.create_server(("127.0.0.1", 0)) as mute:
        monkeypatch.setattr(doctor, "_ANSWER_SECONDS", 0.5)
        for name in ("DATA", "TRAINING", "EVALUATION"):
            monkeypatch.setenv(f"LUTHIER_{name}_METRICS_ADDRESS", free_address())
        monkeypatch.setenv("LUTHIER_TRAINING_METRICS_ADDRESS", f"127.0.0.1:{mute.getsockname()[1]}")
        addresses = {name: free_address() for name in ("data", "training", "evaluation")}
        found = {one.what: one.level for one in doctor.examined(tmp_path, addresses)}
    assert found["training metrics"] == "problem"
    assert found["data metrics"] == found["evaluation metrics"] == "ok"


def test_kernels_are_named_by_what_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = {"a": {"avx2/float32/x": "cpu"}, "b": {"avx2/float32/x": "eager", "plain/float32/x": "cpu"}}
    tables |= {"c": {"avx2/float32/x": "cpu", "avx2/bfloat16/x": "eager"}, "d": {"plain/float32/x": "cpu"}}
    monkeypatch.setattr(doctor, "OPS", tuple(tables))
    monkeypatch.setattr(doctor, "entries", tables.__getitem__)
    monkeypatch.setattr(doctor, "current_isa", lambda: "avx2")
    assert doctor.kernels().text == (
        "3 of 4 operators are measured on avx2; C++: a; torch: b; either, by shape: c; torch, unmeasured: d"
    )
    monkeypatch.setattr(doctor, "current_isa", lambda: "avx512")
    assert doctor.kernels().level == "warning"


def test_every_operator_of_this_machine_has_a_way() -> None:
    for op in OPS:
        assert op in doctor.kernels().text


def worker_config(**changes: object) -> WorkerConfig:
    return replace(read(WorkerConfig, section="WORKER"), device="cpu", **changes)  # type: ignore[arg-type]


def test_an_executor_that_is_chosen_must_be_able_to_run() -> None:
    assert "in one process" in doctor.executor(worker_config()).text
    ranks = doctor.executor(worker_config(executor="torchrun", ranks=1))
    assert (ranks.level, "on up to 1 ranks of this machine" in ranks.text) == ("ok", True)
    for changes, words in (
        ({"executor": "dask"}, "got 'dask'"),
        ({"ranks": 2}, "must be 1 with the executor inline"),
        ({"executor": "torchrun", "ranks": 4096}, "4096"),
    ):
        with pytest.raises(InvalidArgument, match=words):
            doctor.executor(worker_config(**changes))


def test_a_ray_cluster_that_is_not_there_is_a_problem(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("versions", "processor", "kernels", "memory", "clock"):
        monkeypatch.setattr(doctor, name, lambda: doctor.Finding(what="x", level="ok", text=""))
    monkeypatch.setenv("HF_ENDPOINT", f"https://{free_address()}")
    monkeypatch.setenv("LUTHIER_WORKER_EXECUTOR", "ray")
    monkeypatch.setenv("LUTHIER_WORKER_RAY_ADDRESS", free_address())
    found = {one.what: one for one in doctor.examined(tmp_path, {})}
    assert found["executor"].level == "problem", found["executor"].text


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
        "executor",
        "data metrics",
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
