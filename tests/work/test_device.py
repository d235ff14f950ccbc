"""A worker's device: chosen before it registers, by a process of its own where a GPU may be."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from luthier.errors import InvalidArgument, Unavailable
from luthier.work.device import chosen_device
from luthier.work.requirements import GIB

FOUND = {
    "device": "cuda:1",
    "warnings": [],
    "kind": "CUDA",
    "name": "a GPU",
    "memory_bytes": 80 * GIB,
    "num_devices": 2,
}


class Probe:
    """Stands for the process that asks torch."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[str] = []
        self.answer: dict[str, Any] = dict(FOUND)
        self.code, self.stdout, self.stderr = 0, "", ""
        monkeypatch.setattr(subprocess, "run", self.run)

    def run(self, command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        self.asked.append(command[-1])
        stdout = self.stdout or f"a library says something\n{json.dumps(self.answer)}\n"
        return subprocess.CompletedProcess(command, self.code, stdout, self.stderr)


@pytest.fixture
def probe(monkeypatch: pytest.MonkeyPatch) -> Probe:
    return Probe(monkeypatch)


@pytest.fixture
def driver(tmp_path: Path) -> tuple[str, ...]:
    path = tmp_path / "driver"
    path.touch()
    return (str(path),)


def test_without_a_driver_nobody_is_asked(probe: Probe) -> None:
    for wanted in ("auto", "cpu"):
        chosen = chosen_device(wanted, drivers=("/dev/none such",))
        assert (chosen.name, chosen.equipment.device) == ("cpu", "CPU")
        assert chosen.equipment.memory_bytes > 0
        assert chosen.environment == {}
    assert probe.asked == []


def test_the_processor_by_name_asks_for_no_gpu(probe: Probe, driver: tuple[str, ...]) -> None:
    assert chosen_device("cpu", driver).name == "cpu"
    assert probe.asked == []


@pytest.mark.parametrize("wanted", ["auto", "cuda:1"])
def test_a_gpu_is_told_with_its_memory(probe: Probe, driver: tuple[str, ...], wanted: str) -> None:
    chosen = chosen_device(wanted, driver)
    assert probe.asked == [wanted]
    assert chosen.name == "cuda:1"
    assert str(chosen.equipment) == "has CUDA (a GPU) with 80.0 GiB"
    assert chosen.environment["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_a_gpu_that_auto_passes_over_is_a_warning(
    probe: Probe, driver: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    probe.answer = {"device": "cpu", "warnings": ["the GPU cuda:0 does not work and is passed over: x"]}
    assert chosen_device("auto", driver).name == "cpu"
    assert [one.message for one in caplog.records if one.levelname == "WARNING"] == probe.answer["warnings"]


@pytest.mark.parametrize("wanted", ["gpu", "", "cuda:", "cuda:-1", "cuda:1000", "CPU", "cpu:0", "mps"])
def test_what_is_no_device_is_refused_at_once(probe: Probe, wanted: str) -> None:
    with pytest.raises(
        InvalidArgument, match="must be auto, cpu, cuda, cuda:N, rocm or rocm:N, got"
    ) as caught:
        chosen_device(wanted)
    assert repr(wanted) in caught.value.message
    assert probe.asked == []


def test_what_is_not_there_is_refused_in_the_words_of_who_looked(probe: Probe) -> None:
    probe.answer = {"error": "got 'cuda:7'; there is cpu, cuda:0 (a GPU)"}
    with pytest.raises(InvalidArgument, match=r"got 'cuda:7'; there is cpu, cuda:0 \(a GPU\)"):
        chosen_device("cuda:7")


def test_a_driver_that_kills_or_hangs_who_asks_is_told_of(
    probe: Probe, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe.code, probe.stderr = -11, "loading\nSegmentation fault"
    with pytest.raises(Unavailable, match="ended with -11 and said Segmentation fault"):
        chosen_device("cuda")

    def hangs(command: list[str], **_: Any) -> None:
        raise subprocess.TimeoutExpired(command, 1)

    monkeypatch.setattr(subprocess, "run", hangs)
    with pytest.raises(
        Unavailable, match="known within 300 s, asking for it hangs; LUTHIER_WORKER_DEVICE=cpu"
    ):
        chosen_device("cuda")


def test_asking_for_a_gpu_for_real_names_what_there_is() -> None:
    """With torch itself, which tells of this machine what it is."""
    command = [sys.executable, "-P", "-m", "luthier.lm.device", "cuda:999"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "got 'cuda:999'; there is cpu" in json.loads(done.stdout)["error"]
